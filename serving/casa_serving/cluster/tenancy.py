"""The applications of a Ray cluster that others may use too: which are there, and which one is of this process.

Ray Serve knows applications by name alone: a second one of the same name replaces the first, and
whoever knows the name may delete it. Who deployed an application is the job (Ray's word for a
process that has connected) of its deployments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from casa_engine.errors import InputError

if TYPE_CHECKING:
    from ray.serve._private.client import ServeControllerClient
    from ray.serve.config import HTTPOptions

INGRESS = "CasaIngress"
# Options of the proxies that a user may ask for, and that only Serve's first start decides.
ADDRESS = ("host", "port")


def serve_client() -> ServeControllerClient | None:
    """Returns a client of the Ray Serve that runs on this cluster; None where it does not."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def check_free(applications: Mapping[str, Any], name: str, route_prefix: str) -> None:
    """Refuses a name or a route that an application has already.

    Args:
        applications: Ray Serve's details of those that are there, by name.
        name: Of the application that is to be deployed.
        route_prefix: Its route.

    Raises:
        InputError: Which application is there, and what may be done about it.
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
    """Refuses an address that the proxies of Ray Serve do not have, which it would pass over.

    Args:
        running: The options with which Ray Serve was started.
        asked: The user's, by name; without those that he leaves open.

    Raises:
        InputError: Which address it is.
    """
    got = [f"{name} {asked[name]}" for name in ADDRESS if name in asked and asked[name] != getattr(running, name)]
    if got:
        raise InputError(
            f"Ray Serve runs on this cluster already, with proxies at {running.host}:{running.port}; its first start "
            f"decided that. Got {', '.join(got)}: pass that address, or none."
        )


def deployments(client: ServeControllerClient, name: str) -> Mapping[str, Any]:
    """Returns the deployments that an application is meant to have, as far as they are there; empty without it."""
    return client.get_serve_details()["applications"].get(name, {}).get("deployments", {})


def is_own(client: ServeControllerClient, name: str) -> bool:
    """Returns whether the application of this name was deployed by this process, and by nobody since."""
    import ray

    # Those of one that was replaced are found under its name for a while.
    if INGRESS not in deployments(client, name):
        return False
    try:
        info, _ = client.get_deployment_info(INGRESS, name)
    except KeyError:
        return False
    return info.deployer_job_id == ray.get_runtime_context().get_job_id()
