"""What a session gives for a frame or a question, from the engine to the client and to the files of `casa-caption`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextDelta:
    """The next piece of the current caption or answer."""

    text: str


@dataclass(frozen=True)
class FrameResult:
    """Result of a frame: the fields of the event `frame.done`, and what the statistics count.

    Attributes:
        timestamp: Its time in the video, in seconds.
        caption: The whole caption; "" if the model stayed silent.
        num_tokens: Tokens generated, the stop token included.
        truncated: The caption reached its maximum length.
        trimmed: The text budget was reached before this frame: the oldest captions were removed.
        restarted: The engine had lost the session; it was restarted from its text.
        queue_ms: Milliseconds from the frame's arrival to the start of processing.
        ttft_ms: Milliseconds from the start of processing to the first token.
        total_ms: Milliseconds from the start of processing to the last token.
        delay_ms: Milliseconds from the frame's arrival to the last token.
        text_tokens: Text tokens of the session in the KV cache.
        image_tokens: Image tokens of this frame.
        image_pages: Their KV-cache pages, over all image groups.
        kv_bytes: Bytes of the session's KV-cache pages with this frame: text and image.
        insertion_bytes: Bytes of KV cache that this frame's image tokens would take for good if they were inserted into
            the text, where every layer has them.
    """

    timestamp: float
    caption: str
    num_tokens: int
    truncated: bool
    trimmed: bool
    restarted: bool
    queue_ms: float
    ttft_ms: float
    total_ms: float
    delay_ms: float
    text_tokens: int
    image_tokens: int
    image_pages: int
    kv_bytes: int
    insertion_bytes: int


@dataclass(frozen=True)
class AnswerResult:
    """Result of a question; the attributes are those of `FrameResult`."""

    answer: str
    num_tokens: int
    truncated: bool
    trimmed: bool
    restarted: bool
    ttft_ms: float
    total_ms: float
    text_tokens: int
