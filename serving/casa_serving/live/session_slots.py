"""How many sessions a server process takes, and how all of them learn that it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

from casa_serving.live.metrics import LiveMetrics
from casa_serving.live.protocol import LiveError


class SessionSlots:
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
        self._shares = Fraction(0)
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def acquire(self) -> Iterator[None]:
        """Holds a place as long as the body runs.

        Raises:
            LiveError: all of them are taken.
        """
        if self._taken >= self.max_sessions:
            raise LiveError(
                "too_many_sessions",
                f"All places are taken: {self._taken} sessions run, at most {self.max_sessions} are taken "
                "(--live-max-sessions). Try again later.",
            )
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    @contextmanager
    def reserve_memory(self, capacity: int) -> Iterator[None]:
        """Holds a session's share of the engine's pages as long as the body runs.

        Args:
            capacity: How many such sessions fit into the engine.

        Raises:
            LiveError: what is left does not suffice.
        """
        share = Fraction(1, capacity) if capacity else Fraction(2)
        if self._shares + share > 1:
            raise LiveError(
                "too_many_sessions",
                f"The engine's memory is taken: the sessions that run may need {float(self._shares):.0%} of it, this "
                f"one {float(share):.0%}. Ask for a smaller text_budget, or try again later.",
            )
        self._shares += share
        try:
            yield
        finally:
            self._shares -= share

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
