"""Queue of one session: at most one frame, and a few questions.

    arriving:    f0  f1  f2  f3      q
    in progress: f0 ........ f3 ...  q ..
    waiting:         f1  f2  f3                f1 and f2 are dropped, never queued

A model that is slower than the video therefore lags by one frame at most, however long it runs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from casa_serving.live.protocol import Frame, LiveError

MAX_QUESTIONS = 4


@dataclass(frozen=True)
class PendingQuestion:
    """A question in the queue.

    Attributes:
        number: 0 for the session's first.
        text: The question.
        id: The client's own name for it.
        arrived_s: Time of arrival on the server's monotonic clock, in seconds.
    """

    number: int
    text: str
    id: str | None
    arrived_s: float


class LatestFrameQueue:
    """The latest frame and a few questions, from the task that reads the connection to the one that captions."""

    def __init__(self) -> None:
        self._frame: Frame | None = None
        self._questions: deque[PendingQuestion] = deque()
        self.ended = False
        self._changed = asyncio.Event()

    def put_frame(self, frame: Frame) -> Frame | None:
        """Store a frame; return the waiting one that it replaces, or None."""
        replaced, self._frame = self._frame, frame
        self._changed.set()
        return replaced

    def put_question(self, question: PendingQuestion) -> None:
        """Add a question.

        Raises:
            LiveError: Too many are waiting (`bad_message`).
        """
        if len(self._questions) >= MAX_QUESTIONS:
            raise LiveError(
                "bad_message",
                f"Too many questions: {MAX_QUESTIONS} are waiting already. Wait for an `answer.done`.",
                id=question.id,
            )
        self._questions.append(question)
        self._changed.set()

    def end(self) -> None:
        """Mark the end: nothing will be added."""
        self.ended = True
        self._changed.set()

    def waiting(self) -> list[Frame | PendingQuestion]:
        """Return what nobody has taken."""
        return [*self._questions, *([self._frame] if self._frame else [])]

    async def get(self) -> Frame | PendingQuestion | None:
        """Wait for the next item, questions first; return None at the end."""
        while True:
            if self._questions:
                return self._questions.popleft()
            if self._frame is not None:
                frame, self._frame = self._frame, None
                return frame
            if self.ended:
                return None
            self._changed.clear()
            await self._changed.wait()
