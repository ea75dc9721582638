"""Ports and hosts that a cluster of one machine listens on, in options and in URLs."""

from __future__ import annotations

import argparse
import socket

from casa_engine.errors import InputError

MAX_PORT = 65_535
REACH_TIMEOUT_S = 10.0


def local(host: str) -> str:
    """Return the address by which this machine reaches a server that listens on `host`."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def url_host(host: str) -> str:
    """Return a host as part of a URL: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def port_number(text: str) -> int:
    """Read a port from the command line."""
    port = whole_number(text)
    if port > MAX_PORT:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to {MAX_PORT}, got {text!r}")
    return port


def whole_number(text: str) -> int:
    """Read a number of at least 0 from the command line."""
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def check_port(host: str, port: int) -> int:
    """Reject an address that cannot be listened on, before anything is started.

    Returns:
        The port; a free one for 0.

    Raises:
        InputError: The port is in use, or this machine has no such address.
    """
    # Detects IPv6 as Ray Serve does.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"Nothing can listen on {url_host(host)}:{port} ({error.strerror or error}). Stop what listens there, "
                "or pass another --host or --port (make serve-ray PORT=...)."
            ) from error
        return probe.getsockname()[1]


def reach(address: str) -> None:
    """Connect to HOST:PORT and close: Ray would retry for minutes. Other forms are checked by Ray.

    Raises:
        OSError: Nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isascii() and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT_S).close()
