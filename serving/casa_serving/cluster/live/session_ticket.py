"""What a replica and an ingress exchange about a live session before its first message."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

TOKEN_HEADER = "x-casa-token"


@dataclass(frozen=True)
class SessionTicket:
    """A slot that a replica has reserved for one session.

    Attributes:
        url: The replica's WebSocket.
        token: Authorizes one connection to it.
        drain_url: A POST there closes all sessions of the replica.
        drain_token: Authorizes that request.
    """

    url: str
    token: str
    drain_url: str
    drain_token: str


@dataclass(frozen=True)
class SessionRejection:
    """A replica has no free slot.

    Attributes:
        reason: Why, part of the client's error message.
    """

    reason: str


class ReplicaShutdown:
    """Event: a session's replica shuts down. Created in the event loop that waits for it, set from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._notified = asyncio.Event()

    def notify(self) -> None:
        """Set the event; do nothing if the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._notified.set)

    async def wait(self) -> None:
        """Wait until the event is set."""
        await self._notified.wait()
