"""What a replica and an ingress say to each other about a live session before its first message."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

TOKEN_HEADER = "x-casa-token"


@dataclass(frozen=True)
class SessionTicket:
    """A place that a replica holds for one session.

    Attributes:
        url: The replica's WebSocket.
        token: Opens it, once.
        drain_url: Where the replica is asked to send all its sessions away.
        drain_token: Goes with that.
    """

    url: str
    token: str
    drain_url: str
    drain_token: str


@dataclass(frozen=True)
class LiveRefusal:
    """A replica has no place.

    Attributes:
        reason: Why, for the client.
    """

    reason: str


class ReplicaShutdown:
    """The news that a session's replica leaves; made in the loop that waits for it, told from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._notified = asyncio.Event()

    def notify(self) -> None:
        """Tells it; nobody listens any more where the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._notified.set)

    async def wait(self) -> None:
        """Waits until it is told."""
        await self._notified.wait()
