"""Sessions that stay open while more are added, and what became of the frames that were due in a time common to all.

    sessions 1 to 64   | start one by one | . . counted . . |                  | . . counted . . |
    sessions 65 to 128                                      | start one by one | . . counted . . |

A session's first frame brings its whole text, a thousand tokens or more: opened all at once and counted at once, they
would measure that and not captioning.
"""

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

FPS, BOUND_MS = 2.0, 500.0
# Spreads sessions over the time between two frames, and their texts over that between two trims, whatever their number.
GOLDEN = 0.618


@dataclass(frozen=True)
class Frame:
    """A frame that was answered.

    Attributes:
        due_s: When it was to be shown, on the monotonic clock.
        delay_ms: From then until its caption was complete.
        num_tokens: Of the caption.
        is_trimmed: Whether the session's text was trimmed before it.
    """

    due_s: float
    delay_ms: float
    num_tokens: int
    is_trimmed: bool


@dataclass(frozen=True)
class Count:
    """The frames that were due in some seconds.

    Attributes:
        num_due: How many.
        frames: Those that were answered. The others are later than any: dropped by a session that was behind, still
            without an answer, or of a session that has failed.
    """

    num_due: int
    frames: list[Frame]

    @property
    def late_share(self) -> float:
        """Share of the frames that were not answered within the bound."""
        return 1 - sum(frame.delay_ms <= BOUND_MS for frame in self.frames) / self.num_due


class Ramp:
    """Open sessions, each shown its frames by the clock.

    Args:
        open_session: Opens the session of a place, 0 for the first; it is closed with `close()`.
        caption: Captions a session's next frame, given its timestamp and when it was due.
    """

    def __init__(
        self,
        open_session: Callable[[int], Awaitable[Any]],
        caption: Callable[[Any, float, float], Awaitable[Any]],
    ) -> None:
        self._open, self._caption = open_session, caption
        self._tasks: list[asyncio.Task[None]] = []
        self._frames: list[Frame] = []

    async def grow(self, number: int, spread_s: float) -> None:
        """Open sessions until there are so many, one by one over this time; return when it is over."""
        begun_s, num_open = time.monotonic(), len(self._tasks)
        for place in range(num_open, number):
            after_s = spread_s * (place - num_open) / (number - num_open) + place * GOLDEN % 1 / FPS
            self._tasks.append(asyncio.create_task(self._show(place, begun_s + after_s)))
        await asyncio.sleep(spread_s)

    async def count(self, seconds: float) -> Count:
        """Return the frames that are due in the next seconds; those due last are given the time of the bound."""
        begun_s = time.monotonic()
        await asyncio.sleep(seconds + BOUND_MS / 1e3)
        frames = [frame for frame in self._frames if begun_s <= frame.due_s < begun_s + seconds]
        return Count(len(self._tasks) * round(seconds * FPS), frames)

    async def close(self) -> int:
        """Close all sessions; return how many had failed, the first of them printed."""
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        # Cancelled ones have no Exception.
        errors = [error for error in ended if isinstance(error, Exception)]
        for error in errors[:1]:
            traceback.print_exception(error)
        return len(errors)

    async def _show(self, place: int, start_s: float) -> None:
        await asyncio.sleep(max(0.0, start_s - time.monotonic()))
        session = await self._open(place)
        try:
            number = 0
            while True:
                due_s = start_s + number / FPS
                # Behind by a frame: this one is dropped, as the server drops it.
                if time.monotonic() <= due_s + 1 / FPS:
                    await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                    result = await self._caption(session, number / FPS, due_s)
                    self._frames.append(Frame(due_s, result.delay_ms, result.num_tokens, result.trimmed))
                number += 1
        finally:
            await session.close()
