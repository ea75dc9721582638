"""How many sessions a server process takes, and how all of them learn that it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from casa_serving.live.protocol import LiveError
from casa_serving.live.statistics import LiveMetrics


class Registry:
    """The places for sessions in this process.

    Args:
        max_sessions: How many there are.
        metrics: Where the number of taken ones is told.

    Attributes:
        closing: Set when the server is asked to end.
    """

    def __init__(self, max_sessions: int, metrics: LiveMetrics) -> None:
        self.max_sessions = max_sessions
        self.closing = asyncio.Event()
        self._metrics = metrics
        self._taken = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Holds a place as long as the body runs.

        Raises:
            LiveError: all of them are taken.
        """
        self.check(self.max_sessions)
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def check_capacity(self, capacity: int) -> None:
        """Refuses the newest session if the engine's pages do not suffice for all that are open.

        Args:
            capacity: How many sessions like the newest fit.
        """
        self.check(min(self.max_sessions, capacity), own=1)

    def check(self, limit: int, own: int = 0) -> None:
        """Raises LiveError if `limit` places are taken, `own` of them by the asking session itself."""
        if self._taken - own >= limit:
            raise LiveError(
                "too_many_sessions",
                f"All places are taken: {self._taken - own} sessions run, at most {limit} are taken "
                "(--live-max-sessions, and what fits into the engine's memory). Try again later.",
            )

    async def close(self, timeout_s: float) -> None:
        """Tells every session that the server ends, and waits until they have said good-bye."""
        self.closing.set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return  # Those that do not answer are cut off by the server itself.

    def _change(self, change: int) -> None:
        self._taken += change
        self._metrics.sessions.set(self._taken)
        if self._taken:
            self._empty.clear()
        else:
            self._empty.set()
