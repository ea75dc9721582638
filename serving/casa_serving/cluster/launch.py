"""`casa-serve --ray [CONFIG.yaml]`: a cluster of one machine, or a part in one that runs already.

With a Ray cluster's address in RAY_ADDRESS the application is put onto that cluster; otherwise Ray
is started on this machine and ends with this process.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from casa_engine.errors import CasaError, InputError
from casa_serving.cluster.config_file import ConfigFile, read_file
from casa_serving.cluster.first_request import first_request

if TYPE_CHECKING:
    from ray import serve

APPLICATION = "casa"
INTERRUPTED = 130
ENVIRONMENT = {
    # Nothing is reported to anybody.
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}


def set_environment() -> None:
    """Sets what Ray reads when it is imported and what its processes inherit, where it is not set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser for what follows `--ray`."""
    parser = argparse.ArgumentParser(prog="casa-serve --ray", description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", type=Path, help="YAML file (docs/cluster.md); default: the embedded model")
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (8000)")
    parser.add_argument("--metrics-port", type=int, default=8080, help="Prometheus endpoint of this node (%(default)s)")
    parser.add_argument("--num-cpus", type=int, help="CPUs that Ray hands out on this machine; default: what it has")
    return parser


def run(argv: list[str]) -> int:
    """Runs the application until it is stopped; returns the exit status.

    Args:
        argv: The command line behind `--ray`.
    """
    options = build_parser().parse_args(argv)
    set_environment()
    try:
        file = read_file(options.config) if options.config else ConfigFile()
        # Only now: Ray reads the environment when it is imported.
        from casa_serving.cluster.application import check_config

        check_config(file.args)
        start(file, options)
    except CasaError as error:
        print(f"casa-serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def start(file: ConfigFile, options: argparse.Namespace) -> None:
    """Starts Ray and the application, and waits for a signal.

    Raises:
        InputError: Nothing can listen where it should, the configuration does not fit the cluster, or the
            application does not start.
    """
    from ray import serve

    from casa_serving.cluster.application import build

    host = options.host or file.http_options.get("host", "127.0.0.1")
    port = options.port if options.port is not None else file.http_options.get("port", 8000)
    if not is_attached():
        check_port(host, port)
    connect(options)
    # As Ctrl-C, in place of Ray's own: Ray Serve waits without end for what may never come, such as a node.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        application = build(file.args)
        serve.start(proxy_location=file.proxy_location, http_options={**file.http_options, "host": host, "port": port})
        deploy(application)
        try:
            first_request(f"http://{local(host)}:{port}")
        except OSError as error:
            raise InputError(
                f"The application runs, but {host}:{port} does not answer ({error}). Where Ray Serve runs on the "
                "cluster already, its first start decided the address of its proxies: pass that one."
            ) from error
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(f"casa-serve: ready at http://{host}:{port}", flush=True)
        stop.wait()
    finally:
        leave()


def is_attached() -> bool:
    """Tells whether the application goes onto a cluster that runs already."""
    return bool(os.environ.get("RAY_ADDRESS"))


def deploy(application: serve.Application) -> None:
    """Runs the application and waits until it is ready.

    Raises:
        InputError: Its replicas do not start; Ray Serve has given up.
    """
    from ray import serve

    try:
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise InputError(f"The application does not start. The reason is in the log above: {error}") from error


def leave() -> None:
    """Takes away what this process has started: the application alone where the cluster is somebody else's."""
    import ray
    from ray import serve

    if is_attached():
        serve.delete(APPLICATION)
    else:
        serve.shutdown()
    ray.shutdown()


def local(host: str) -> str:
    """Returns the address by which this machine reaches a server that listens on `host`."""
    return "127.0.0.1" if host in ("", "0.0.0.0") else host


def check_port(host: str, port: int) -> None:
    """Refuses a port that somebody listens on, before anything is started."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"Nothing can listen on {host}:{port} ({error.strerror}). Stop what listens there, or pass another "
                "with --port (make serve-ray PORT=...)."
            ) from error


def connect(options: argparse.Namespace) -> None:
    """Connects to the cluster in RAY_ADDRESS, or starts one on this machine.

    Raises:
        InputError: No cluster answers there.
    """
    import ray

    if is_attached():
        try:
            ray.init(log_to_driver=True)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"No Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']!r}: {error}") from error
        return
    ray.init(
        # Without, Ray would join any cluster that it finds on this machine.
        address="local",
        num_cpus=options.num_cpus,
        include_dashboard=False,
        logging_level=logging.WARNING,
        _metrics_export_port=options.metrics_port,
    )
