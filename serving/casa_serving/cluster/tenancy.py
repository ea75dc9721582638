"""The applications on a shared Ray cluster: which exist, and which was deployed by this process.

Ray Serve identifies applications by name alone: a second one of the same name replaces the first, and
any client may delete it by its name. The owner of an application is the job (Ray's term for a connected
process) of its deployments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from casa_engine.errors import InputError

if TYPE_CHECKING:
    from ray.serve._private.client import ServeControllerClient
    from ray.serve.config import HTTPOptions

INGRESS = "CasaIngress"
# Options of the proxies that a user may set, and that only the first start of Serve applies.
ADDRESS = ("host", "port")


def serve_client() -> ServeControllerClient | None:
    """Return a client of this cluster's Ray Serve; None if it is not running."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def check_free(applications: Mapping[str, Any], name: str, route_prefix: str) -> None:
    """Reject a name or a route that is in use.

    Args:
        applications: Ray Serve's details of the deployed applications, by name.
        name: Of the application to deploy.
        route_prefix: Its route.

    Raises:
        InputError: Names the application that uses it, and how to fix it.
    """
    if name in applications:
        raise InputError(
            f"An application {name!r} runs on this cluster already; it would be replaced. Change it with "
            "`serve deploy`, end the command that runs it, or delete it (ray.serve.delete)."
        )
    for other, details in applications.items():
        if details.get("route_prefix") == route_prefix:
            raise InputError(
                f"The application {other!r} of this cluster is served at {route_prefix} already. Give it another "
                "route_prefix, or delete it (ray.serve.delete)."
            )


def check_address(running: HTTPOptions, asked: Mapping[str, Any]) -> None:
    """Reject an address other than that of the running proxies, which Ray Serve would ignore.

    Args:
        running: The options with which Ray Serve was started.
        asked: The options that the user has set, by name.

    Raises:
        InputError: Names the address of the running proxies.
    """
    got = [f"{name} {asked[name]}" for name in ADDRESS if name in asked and asked[name] != getattr(running, name)]
    if got:
        raise InputError(
            f"Ray Serve runs on this cluster already, with proxies at {running.host}:{running.port}; its first start "
            f"decided that. Got {', '.join(got)}: pass that address, or none."
        )


def deployments(client: ServeControllerClient, name: str) -> Mapping[str, Any]:
    """Return the existing deployments of an application; empty if there is no such application."""
    return client.get_serve_details()["applications"].get(name, {}).get("deployments", {})


def is_own(client: ServeControllerClient, name: str) -> bool:
    """Return whether the application of this name was deployed by this process and not replaced since."""
    import ray

    # Deployments of a replaced application are listed under its name for a while.
    if INGRESS not in deployments(client, name):
        return False
    try:
        info, _ = client.get_deployment_info(INGRESS, name)
    except KeyError:
        return False
    return info.deployer_job_id == ray.get_runtime_context().get_job_id()
