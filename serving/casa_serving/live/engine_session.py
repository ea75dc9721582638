"""Live sessions in vLLM's engine: one request whose prompt grows by a frame, restarted from text where it must be."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from casa_engine.live import HistoryItem, LiveSettings

if TYPE_CHECKING:
    from PIL import Image
    from vllm.engine.protocol import EngineClient
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["AnswerResult", "FrameResult", "HistoryItem", "LiveEngine", "LiveSession", "TextDelta", "start_engine"]


@dataclass(frozen=True)
class TextDelta:
    """More words of the caption or answer under way."""

    text: str


@dataclass(frozen=True)
class FrameResult:
    """The end of a frame.

    Attributes:
        caption: All that was said; "" is silence.
        num_tokens: Tokens generated, the stop token included.
        truncated: The caption was cut at its limit.
        ttft_ms: From the frame's arrival here to its first token.
        total_ms: To its last token.
        text_tokens: Text KV of the session.
        image_tokens: Image tokens of this frame.
        image_pages: KV-cache pages that hold them, over all image groups.
        trimmed: The text budget was reached before this frame: the oldest captions left.
        restarted: The engine had lost the session; it was begun again from its text.
    """

    caption: str
    num_tokens: int
    truncated: bool
    ttft_ms: float
    total_ms: float
    text_tokens: int
    image_tokens: int
    image_pages: int
    trimmed: bool
    restarted: bool


@dataclass(frozen=True)
class AnswerResult:
    """The end of an answer; the attributes are those of `FrameResult`."""

    answer: str
    num_tokens: int
    truncated: bool
    ttft_ms: float
    total_ms: float
    text_tokens: int
    trimmed: bool
    restarted: bool


class LiveEngine:
    """Opens sessions in one engine; one for each server or command.

    Args:
        engine: vLLM's client (`AsyncLLM`).
        checkpoint: Folder of the model that it serves.

    Attributes:
        defaults: Settings that fit the checkpoint.
    """

    def __init__(self, engine: EngineClient, checkpoint: Path) -> None:
        self.engine, self.checkpoint = engine, Path(checkpoint)
        self.defaults = LiveSettings.for_checkpoint(self.checkpoint)

    def capacity(self, settings: LiveSettings) -> int:
        """Number of such sessions whose pages fit into the engine at once."""
        raise NotImplementedError

    async def open(self, settings: LiveSettings, history: Sequence[HistoryItem] = ()) -> LiveSession:
        """Begins a session; nothing runs before its first frame.

        Raises:
            InputError: The settings or the history cannot be.
        """
        raise NotImplementedError


class LiveSession:
    """One session; not concurrent: one frame or question at a time."""

    def caption(self, image: Image.Image, timestamp: float) -> AsyncIterator[TextDelta | FrameResult]:
        """Shows a frame; the last item is the `FrameResult`."""
        raise NotImplementedError

    def ask(self, question: str) -> AsyncIterator[TextDelta | AnswerResult]:
        """Asks a question; the last item is the `AnswerResult`."""
        raise NotImplementedError

    async def close(self) -> None:
        """Releases everything in the engine, also in the middle of a frame. Safe to call twice."""
        raise NotImplementedError


async def start_engine(checkpoint: Path) -> AsyncLLM:
    """An engine in processes of its own, with the defaults of `casa-serve`."""
    raise NotImplementedError
