"""What waits for a session's turn: at most one frame, and a few questions.

    arriving:   f0  f1  f2  f3      q
    in work:    f0 ........ f3 ...  q ..
    waiting:        f1  f2  f3                f1 and f2 are dropped, never queued

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
    """A question that waits.

    Attributes:
        number: 0 for the session's first.
        text: The question.
        id: The client's own name for it.
    """

    number: int
    text: str
    id: str | None


class LatestFrameQueue:
    """Filled by the task that reads the connection, emptied by the one that works."""

    def __init__(self) -> None:
        self._frame: Frame | None = None
        self._questions: deque[PendingQuestion] = deque()
        self.ended = False
        self._news = asyncio.Event()

    def put_frame(self, frame: Frame) -> Frame | None:
        """Puts a frame into the one slot; returns the one that it replaces."""
        replaced, self._frame = self._frame, frame
        self._news.set()
        return replaced

    def put_question(self, question: PendingQuestion) -> None:
        """Adds a question; raises LiveError if too many wait."""
        if len(self._questions) >= MAX_QUESTIONS:
            raise LiveError(
                "bad_message",
                f"Too many questions: {MAX_QUESTIONS} are waiting already. Wait for an `answer.done`.",
                id=question.id,
            )
        self._questions.append(question)
        self._news.set()

    def end(self) -> None:
        """Says that nothing will follow."""
        self.ended = True
        self._news.set()

    async def get(self) -> Frame | PendingQuestion | None:
        """Returns what comes next, questions first; None when all is done and nothing follows."""
        while True:
            if self._questions:
                return self._questions.popleft()
            if self._frame is not None:
                frame, self._frame = self._frame, None
                return frame
            if self.ended:
                return None
            self._news.clear()
            await self._news.wait()
