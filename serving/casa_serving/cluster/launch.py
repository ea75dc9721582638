"""`casa-serve --ray [CONFIG.yaml]`: a cluster of one machine, or an application on a running one.

With a Ray cluster's address in RAY_ADDRESS the application is deployed to that cluster; otherwise Ray
is started on this machine and stopped with this process.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from casa_engine.errors import CasaError, InputError
from casa_serving.cluster import tenancy
from casa_serving.cluster.address import check_port, local, port_number, reach, url_host, whole_number
from casa_serving.cluster.config_file import ConfigFile, read_file
from casa_serving.cluster.warmup import warm_up
from casa_serving.drain.processes import Deadline, SignalCounter
from casa_serving.exit_status import INTERRUPTED

if TYPE_CHECKING:
    from ray import serve
    from ray.serve._private.client import ServeControllerClient

APPLICATION = "casa"
ROUTE_PREFIX = "/"
SHUTDOWN_TIMEOUT_S = 30
# Part of the timeout that is reserved for Ray to stop its processes.
RAY_SHUTDOWN_S = 15
# Parts of it: for the final messages of open requests, and for Ray Serve to delete the application.
FINAL_MESSAGES_S = 5
DELETE_TIMEOUT_S = 8
SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_S = 0.5
ENVIRONMENT = {
    # No telemetry.
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}


def set_environment() -> None:
    """Set defaults of environment variables that Ray reads at import and its processes inherit."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def build_parser(program: str = "casa-serve") -> argparse.ArgumentParser:
    """Return the parser for what follows `--ray`; `program` is the command's name in messages."""
    parser = argparse.ArgumentParser(prog=f"{program} --ray", description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", type=Path, help="YAML file (docs/cluster.md); default: the embedded model")
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=port_number, help="port to listen on (8000); 0: any that is free")
    parser.add_argument(
        "--metrics-port", type=port_number, default=8080, help="Prometheus endpoint of this node (%(default)s)"
    )
    parser.add_argument(
        "--num-cpus", type=whole_number, help="CPUs that Ray hands out on this machine; default: what it has"
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=whole_number,
        default=SHUTDOWN_TIMEOUT_S,
        help=f"seconds from SIGTERM to the exit; requests may go on until {RAY_SHUTDOWN_S} s before (%(default)s)",
    )
    return parser


def run(argv: list[str], program: str) -> int:
    """Run the application until it is stopped; return the exit status.

    Args:
        argv: The command line after `--ray`.
        program: The command's name in messages.
    """
    options = build_parser(program).parse_args(argv)
    set_environment()
    try:
        file = read_file(options.config) if options.config else ConfigFile()
        # Imported here because Ray reads the environment at import.
        from casa_serving.cluster.application import check_config

        check_config(file.args)
        if options.shutdown_timeout < RAY_SHUTDOWN_S:
            raise InputError(
                f"--shutdown-timeout is {options.shutdown_timeout}; expected at least {RAY_SHUTDOWN_S} seconds, which "
                "Ray may take to end its processes."
            )
        with SignalCounter():
            start(file, options, program)
    except CasaError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def start(file: ConfigFile, options: argparse.Namespace, program: str) -> None:
    """Start Ray and the application, and wait for a signal.

    Raises:
        InputError: The address cannot be listened on, the configuration does not fit the cluster, the application
            exists already, or it does not start.
    """
    from casa_serving.cluster.application import build

    asked = {name: value for name, value in (("host", options.host), ("port", options.port)) if value is not None}
    asked = {**file.http_options, **asked}
    address = {"host": "127.0.0.1", "port": 8000, **asked}
    if not is_attached() or address["port"] == 0:
        address["port"] = check_port(address["host"], address["port"])
    # Before anything is started that would have to be stopped again.
    if is_attached():
        check_reachable()
    # Like Ctrl-C, in place of Ray's handler: Ray Serve waits without a timeout for what may never come, such as a
    # node. Ray installs its own again when it starts.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        connect(options)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # All checks come first: up to here nothing has changed the cluster.
        if is_attached():
            address |= check_tenants(asked)
        application = build(file.args)
        start_serve(file, address)
        deploy(application)
        url = f"http://{url_host(address['host'])}:{address['port']}"
        try:
            warm_up(f"http://{url_host(local(address['host']))}:{address['port']}")
        except httpx.HTTPError as error:
            # httpx's second line is an address to read about the status.
            reason = str(error).partition("\n")[0]
            raise InputError(f"The application runs, but does not answer at {url}: {reason}.") from error
        stop = threading.Event()
        for number in SIGNALS:
            signal.signal(number, lambda *_: stop.set())
        print(f"{program}: ready at {url}", flush=True)
        stop.wait()
        Deadline(options.shutdown_timeout, 0).start()
        drain_ingresses(options.shutdown_timeout - RAY_SHUTDOWN_S, program)
    finally:
        clean_up(program)


def is_attached() -> bool:
    """Return whether the application is deployed to a running cluster."""
    return bool(os.environ.get("RAY_ADDRESS"))


def check_tenants(asked: dict[str, Any]) -> dict[str, Any]:
    """Reject a deployment that would affect another application on a running cluster.

    Args:
        asked: The address that the user asks for.

    Returns:
        The address of the running proxies; empty if Ray Serve is not running.

    Raises:
        InputError: The name or the route is in use, or the proxies have another address.
    """
    client = tenancy.serve_client()
    if client is None:
        return {}
    tenancy.check_free(client.get_serve_details()["applications"], APPLICATION, ROUTE_PREFIX)
    tenancy.check_address(client.http_config, asked)
    return {name: getattr(client.http_config, name) for name in tenancy.ADDRESS}


def start_serve(file: ConfigFile, address: dict[str, Any]) -> None:
    """Start Ray Serve with its proxies, unless it is running."""
    from ray import serve

    if tenancy.serve_client() is None:
        serve.start(proxy_location=file.proxy_location, http_options={**file.http_options, **address})


def deploy(application: serve.Application) -> None:
    """Run the application and wait until it is ready.

    Raises:
        InputError: Its replicas do not start and Ray Serve has given up, or it was deleted or replaced.
    """
    from ray import serve

    target = serve.RunTarget(application, name=APPLICATION, route_prefix=ROUTE_PREFIX)
    with signals_deferred():
        if is_attached():
            # Again, because building takes a while.
            check_tenants({})
        submit(target)
    client = tenancy.serve_client()
    while (status := client.get_serve_details()["applications"].get(APPLICATION)) is not None:
        # PendingQuestion after the status, which is then of this application, or no longer of interest.
        if not tenancy.is_own(client, APPLICATION):
            break
        if status["status"] == "RUNNING":
            return
        if status["status"] == "DEPLOY_FAILED":
            raise InputError(f"The application does not start. The reason is in the log above: {status['message']}")
        time.sleep(POLL_S)
    raise InputError(f"Somebody has deleted or replaced the application {APPLICATION!r} while it started.")


def submit(target: serve.RunTarget) -> None:
    """Submit an application to Ray Serve; return when one of its name exists, with deployments.

    Ray Serve's own call waits for the deployments without a timeout, forever if they have been replaced meanwhile: so
    it runs in a thread that may be abandoned.

    Raises:
        InputError: Ray Serve rejects it.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    errors: list[BaseException] = []

    def run() -> None:
        try:
            serve.run_many([target], wait_for_applications_running=False)
        # Re-raised below, in the caller's thread.
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=run, name="casa-submit", daemon=True)
    thread.start()
    client = tenancy.serve_client()
    while thread.is_alive() and not tenancy.deployments(client, APPLICATION):
        thread.join(POLL_S)
    if errors and isinstance(errors[0], RayError | RayServeException | TimeoutError):
        raise InputError(f"Ray Serve does not take the application: {errors[0]}") from errors[0]
    if errors:
        raise errors[0]


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer SIGINT and SIGTERM until the body is complete.

    Raises:
        KeyboardInterrupt: One was received.
    """
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt


def drain_ingresses(finish_s: float, program: str) -> None:
    """Drain every ingress; errors are reported and do not stop the shutdown.

    Args:
        finish_s: Seconds for open requests to finish.
        program: The command's name in messages.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    client = tenancy.serve_client()
    if client is None or not tenancy.is_own(client, APPLICATION):
        return
    try:
        handle = serve.get_deployment_handle(tenancy.INGRESS, APPLICATION)
        handle.broadcast("end", finish_s).results(timeout_s=finish_s + FINAL_MESSAGES_S)
    except (RayError, RayServeException, TimeoutError) as error:
        print(f"{program}: not every client could be told: {error}", file=sys.stderr)


def clean_up(program: str) -> None:
    """Stop what this process has started: only its application on a cluster that was running before."""
    import ray
    from ray import serve
    from ray.exceptions import RayError

    if not ray.is_initialized():
        return
    if not is_attached():
        serve.shutdown()
    else:
        try:
            if (client := tenancy.serve_client()) is not None and tenancy.is_own(client, APPLICATION):
                delete_application(client, program)
        except RayError as error:
            print(f"{program}: the cluster does not say whether {APPLICATION!r} is gone: {error}", file=sys.stderr)
    ray.shutdown()


def delete_application(client: ServeControllerClient, program: str) -> None:
    """Make Ray Serve delete the application, and wait for it up to `DELETE_TIMEOUT_S`.

    Ray Serve gives a replica that is still waiting for a node the same time as one with requests, and its own wait ends
    in a TimeoutError; the deletion goes on without this process.
    """
    client.delete_apps([APPLICATION], blocking=False)
    deadline_s = time.monotonic() + DELETE_TIMEOUT_S
    while APPLICATION in client.get_serve_details()["applications"]:
        if time.monotonic() > deadline_s:
            print(
                f"{program}: Ray Serve goes on to delete {APPLICATION!r}: its replicas may take replicas."
                "drain_timeout_s to end.",
                file=sys.stderr,
            )
            return
        time.sleep(POLL_S)


def check_reachable() -> None:
    """Reject an address in RAY_ADDRESS where nothing listens.

    Raises:
        InputError: No cluster answers there.
    """
    try:
        reach(os.environ["RAY_ADDRESS"])
    except (OSError, ValueError) as error:
        raise no_cluster(error) from error


def no_cluster(error: Exception) -> InputError:
    """Return the error for an address where no cluster answers."""
    # Ray does not mention its token to a client that sends none.
    return InputError(
        f"No Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']!r}: {error}. One that has a token "
        "(docs/cluster.md) answers only with RAY_AUTH_MODE=token in the environment."
    )


def connect(options: argparse.Namespace) -> None:
    """Connect to the cluster in RAY_ADDRESS, or start one on this machine.

    Raises:
        InputError: No cluster answers there.
    """
    import ray
    from ray.exceptions import AuthenticationError

    if is_attached():
        try:
            ray.init(log_to_driver=True)
        except (OSError, ValueError, AuthenticationError) as error:
            raise no_cluster(error) from error
        return
    ray.init(
        # Otherwise Ray would join any cluster that it finds on this machine.
        address="local",
        num_cpus=options.num_cpus,
        include_dashboard=False,
        logging_level=logging.WARNING,
        _metrics_export_port=options.metrics_port,
    )
