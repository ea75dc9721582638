"""Limit on the sessions of a server process, and their notification at shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

from casa_serving.live.metrics import LiveMetrics
from casa_serving.live.protocol import LiveError


class SessionSlots:
    """The slots for sessions in this process.

    Args:
        max_sessions: Number of slots.
        metrics: Has the gauge of slots in use.

    Attributes:
        closing: Set when the server shuts down.
    """

    def __init__(self, max_sessions: int, metrics: LiveMetrics) -> None:
        self.max_sessions = max_sessions
        self.closing = asyncio.Event()
        self._metrics = metrics
        self._in_use = 0
        self._shares = Fraction(0)
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def acquire(self) -> Iterator[None]:
        """Acquire a slot for the duration of the body.

        Raises:
            LiveError: All of them are in use (`too_many_sessions`).
        """
        if self._in_use >= self.max_sessions:
            raise LiveError(
                "too_many_sessions",
                f"All places are taken: {self._in_use} sessions run, at most {self.max_sessions} are taken "
                "(--live-max-sessions). Try again later.",
            )
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    @contextmanager
    def reserve_memory(self, capacity: int) -> Iterator[None]:
        """Reserve a session's share of the engine's pages for the duration of the body.

        Args:
            capacity: How many such sessions fit into the engine.

        Raises:
            LiveError: The unreserved share is too small (`too_many_sessions`).
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
        """Close every session and wait until all slots are released, at most `timeout_s` seconds."""
        self.closing.set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return  # uvicorn aborts the connections of those that remain.

    def _change(self, change: int) -> None:
        self._in_use += change
        self._metrics.sessions.set(self._in_use)
        if self._in_use:
            self._empty.clear()
        else:
            self._empty.set()
