"""The last line of a start: where the server is, and what it serves."""

from __future__ import annotations

import asyncio
import logging
import socket
from argparse import Namespace

import uvicorn

logger = logging.getLogger("vllm.casa_serve")
# Addresses that mean every one of the machine's.
ANY_ADDRESS = ("0.0.0.0", "::")
POLL_S = 0.05


async def announce(server: uvicorn.Server, args: Namespace) -> None:
    """Log one line as soon as the server accepts connections; nothing if it never does.

    Args:
        server: vLLM's, which has no hook for that moment.
        args: vLLM's arguments.
    """
    while not server.started:
        if server.should_exit:
            return
        await asyncio.sleep(POLL_S)
    names = args.served_model_name or [args.model]
    logger.info("Ready: %s serves %s.", address(server.servers[0].sockets[0], bool(args.ssl_certfile)), names[0])


def address(listening: socket.socket, is_encrypted: bool) -> str:
    """Return the address of a listening socket, as a client on this machine writes it."""
    name = listening.getsockname()
    if isinstance(name, (str, bytes)):
        return f"unix:{name if isinstance(name, str) else name.decode()}"
    host = "localhost" if name[0] in ANY_ADDRESS else f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http{'s' if is_encrypted else ''}://{host}:{name[1]}"
