"""What a workload asks of a backend: the eager model, vLLM in this process, or somebody's server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from casa_engine.errors import InputError

# A message as `CasaProcessor.apply_chat_template` takes it: role, and content as a list of texts and images.
Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One frame and its answer. None stands for what a backend cannot see.

    Attributes:
        ttft_ms: From the prepared input to the first token, vision encoder included. Of a server: from the request,
            with upload, tokenisation and preprocessing of all that it holds.
        decode_ms: From the first token to the last.
        tokens: Generated tokens.
        prepare_ms: What is done before it, and `ttft_ms` does not hold: tokenisation and image preprocessing; of a
            server, encoding of the frame as JPEG.
        cpu_ms: Processor time of all threads of this process, for preparation, first token and the rest.
        kv_tokens: Positions in the text's KV cache afterwards; image tokens too where they stand in the text.
        kv_bytes: Bytes of all KV cache in use afterwards, images included.
        memory_bytes: Most memory during the turn: GPU memory allocated by torch, or resident memory of this process.
            Of an engine's KV cache, which is allocated as a whole, only what is in use.
    """

    ttft_ms: float
    decode_ms: float
    tokens: int
    prepare_ms: float
    cpu_ms: float | None = None
    kv_tokens: int | None = None
    kv_bytes: int | None = None
    memory_bytes: int | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Rate of the tokens after the first, None where there is no second."""
        return 1000 * (self.tokens - 1) / self.decode_ms if self.tokens > 1 and self.decode_ms > 0 else None

    @property
    def total_ms(self) -> float:
        """From the frame to the last token."""
        return self.prepare_ms + self.ttft_ms + self.decode_ms


@dataclass(frozen=True)
class Answer:
    """The answer to one conversation.

    Attributes:
        text: What was said.
        ttft_ms: From the question to the first token: preparation and waiting included, as a user sees it.
        total_ms: From the question to the last token.
        tokens: Generated tokens.
    """

    text: str
    ttft_ms: float
    total_ms: float
    tokens: int


class Stream(Protocol):
    """One conversation that grows by a frame a turn, and keeps its state."""

    def turn(self, frame: Image.Image, num_tokens: int) -> Turn:
        """Show a frame and generate exactly so many tokens."""

    def close(self) -> None:
        """End the conversation and free what it holds."""


class Backend(Protocol):
    """A model that can be measured.

    Attributes:
        name: `eager`, `engine` or `endpoint`.
        about: For the report: model, fusion, device and versions.
    """

    name: str
    about: dict[str, Any]

    def open_stream(self) -> Stream:
        """Begin a conversation of frames."""

    def answer(self, chats: Sequence[Sequence[Message]], num_tokens: int) -> list[Answer]:
        """Answer conversations that arrive at the same moment, each with exactly so many tokens."""

    def close(self) -> None:
        """Free everything."""


@dataclass(frozen=True)
class Needs:
    """What a workload will ask for at most, so that a backend can refuse it, or make room, before anything runs.

    Attributes:
        images: Images of one conversation.
        image_px: Side of each.
        tokens_per_image: Text tokens that come with each image: delimiters, question, answer.
        concurrency: Conversations at once.
        has_new_images: Whether no image is shown twice, so that keeping prepared pixels would only fill memory.
    """

    images: int
    image_px: int
    tokens_per_image: int
    concurrency: int = 1
    has_new_images: bool = False

    # For roles, the system prompt, the instruction.
    OPENING_TOKENS = 256

    def positions(self, image_tokens: int) -> int:
        """Return the longest text, in which each image takes so many positions (0 in the CA fusions)."""
        return self.OPENING_TOKENS + self.images * (self.tokens_per_image + image_tokens)


def refuse_concurrency(needs: Needs) -> None:
    """Raise InputError where several conversations at once are asked of the eager model."""
    if needs.concurrency > 1:
        raise InputError(
            f"--concurrency is {needs.concurrency}; the eager model answers one conversation at a time: use "
            "--backend engine, or the address of a server."
        )
