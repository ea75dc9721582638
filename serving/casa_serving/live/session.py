"""Live sessions in vLLM's engine: one request whose prompt grows by a frame, restarted from text when necessary.

    frame -> room in the text budget? -- no --> the oldest captions are trimmed, the request is closed
          -> chunk: pending stop token, delimiters, image  -> request (a new one prefills the whole text)
          -> tokens -> transcript

The state of a session is its transcript (`casa_engine.live`); the engine's KV cache is a copy that can be recomputed.
It is recomputed when the budget is reached, and when the engine has lost it: a preempted session cannot be recomputed
from its past frames, whose pixels are gone, and need not be.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casa_engine.checkpoints import read_config
from casa_engine.errors import InputError
from casa_engine.live import HistoryItem, LiveSettings, Transcript
from casa_engine.live.caption_logits import EXTRA_ARG, to_dict
from casa_engine.live.stream_format import StreamFormat
from casa_engine.live.transcript import Chunk, Entry
from casa_serving.live.engine_request import EngineRequest, RequestLostError
from casa_serving.live.engine_start import start_engine
from casa_serving.live.results import AnswerResult, FrameResult, TextDelta
from casa_vllm.api import CAPTION_PROCESSOR, PageCosts

if TYPE_CHECKING:
    from PIL import Image
    from vllm import SamplingParams
    from vllm.engine.protocol import EngineClient

__all__ = [
    "AnswerResult",
    "FrameResult",
    "HistoryItem",
    "LiveEngine",
    "LiveSession",
    "RequestLostError",
    "TextDelta",
    "start_engine",
]
# Retries of a chunk after the engine has lost the session.
MAX_RESTARTS = 3


class LiveEngine:
    """Opens sessions in one engine; one per server or command.

    Args:
        engine: vLLM's client (`AsyncLLM`).
        checkpoint: Folder of the model that it serves.
        allow_insertion: Accept checkpoints that insert image tokens, which fill the context; for benchmarks.

    Attributes:
        defaults: Settings that fit the checkpoint.
        model_name: As clients know it.
    """

    def __init__(self, engine: EngineClient, checkpoint: Path, *, allow_insertion: bool = False) -> None:
        self.engine, self.checkpoint = engine, Path(checkpoint)
        self._allow_insertion = allow_insertion
        self.config = read_config(self.checkpoint)
        self.format = StreamFormat.from_checkpoint(self.checkpoint)
        self.defaults = LiveSettings.for_checkpoint(self.checkpoint)
        self.pages = PageCosts.of_engine(self.config, engine.vllm_config)
        self.model_name = str(engine.model_config.served_model_name)

    def capacity(self, settings: LiveSettings) -> int:
        """Return how many sessions with these settings fit into the engine's KV cache."""
        max_image_tokens = self.format.processor.max_image_tokens
        per_session = self.pages.session_pages(settings.text_budget, max_image_tokens)
        # One page is vLLM's null page.
        num_pages = (self.engine.vllm_config.cache_config.num_gpu_blocks or 1) - 1
        return min(num_pages // per_session, self.engine.vllm_config.scheduler_config.max_num_seqs)

    async def open(self, settings: LiveSettings, history: Sequence[HistoryItem] = ()) -> LiveSession:
        """Open a session; the engine is idle before its first frame.

        Raises:
            InputError: The settings or the history are invalid.
        """
        if not self.config.is_cross_attention and not self._allow_insertion:
            raise InputError(
                "this checkpoint inserts image tokens into the text, which no text budget bounds; expected one with "
                "cross-attention: live sessions are for CASA models."
            )
        longest = self.engine.model_config.max_model_len
        if settings.text_budget > longest:
            raise InputError(
                f"text_budget is {settings.text_budget}; expected at most {longest}, the model's context "
                "(--max-model-len)."
            )
        transcript = Transcript(self.format, settings, history)
        if not transcript.rules.is_neutral and not self._supports_rules():
            raise InputError(
                "repetition_penalty, stop_bias and ngram_size are set, and this engine was started without the "
                f"captioner's logits processor: start it with --logits-processors {CAPTION_PROCESSOR}, or set "
                "repetition_penalty 1, stop_bias 1 and ngram_size 0."
            )
        return LiveSession(self, transcript)

    def _supports_rules(self) -> bool:
        # Model Runner V2 supports no logits processors; there CASA's model state applies the rules.
        is_v2 = self.config.is_cross_attention and self.engine.vllm_config.use_v2_model_runner
        return is_v2 or CAPTION_PROCESSOR in (self.engine.model_config.logits_processors or ())

    async def render(self, chunk: Chunk, images: list[Image.Image]) -> Any:
        """Render a chunk with vLLM's renderer, which resizes images in threads.

        Raises:
            InputError: vLLM refuses the chunk, in most cases for its image.
        """
        from vllm.exceptions import VLLMValidationError  # no ValueError
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        prompt: dict[str, Any] = {"prompt_token_ids": list(chunk.token_ids)}
        for point in reversed(chunk.insertion_points):
            prompt["prompt_token_ids"].insert(point, self.format.image_token_id)
        if images:
            prompt["multi_modal_data"] = {"image": images}
        renderer = self.engine.renderer
        try:
            parsed = parse_model_prompt(self.engine.model_config, prompt)
            (rendered,) = await renderer.render_cmpl_async([parsed], renderer.default_cmpl_tok_params)
        except (ValueError, VLLMValidationError) as error:
            raise InputError(str(error)) from error
        return rendered


@dataclass
class Progress:
    """State of the current chunk's answer; times are of the monotonic clock, in seconds."""

    started_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    token_ids: list[int] = field(default_factory=list)
    sent_text: str = ""
    trimmed: bool = False
    restarts: int = 0
    image_tokens: int = 0
    entry: Entry | None = None

    def add(self, token_ids: Sequence[int]) -> None:
        """Append tokens."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic()
        self.token_ids += token_ids

    def delta(self, text: str) -> str:
        """Return the part of the text that was not sent yet; "" while a character is incomplete.

        After a restart the text may differ from what was sent; the final result has the correct one.
        """
        if text.endswith("\ufffd") or not text.startswith(self.sent_text):
            return ""
        before, self.sent_text = self.sent_text, text
        return text[len(before) :]

    def common_fields(self, stop_ids: Sequence[int]) -> dict[str, Any]:
        """Return the fields that results of frames and answers share."""
        ended_s = time.monotonic()
        return {
            "num_tokens": len(self.token_ids),
            "truncated": self.token_ids[-1] not in stop_ids,
            "ttft_ms": 1000 * ((self.first_token_s or ended_s) - self.started_s),
            "total_ms": 1000 * (ended_s - self.started_s),
            "trimmed": self.trimmed,
            "restarted": self.restarts > 0,
        }


class LiveSession:
    """One session; not for concurrent use: one frame or question at a time.

    Args:
        engine: The engine that runs it.
        transcript: Its text so far.
    """

    def __init__(self, engine: LiveEngine, transcript: Transcript) -> None:
        self.engine, self.transcript = engine, transcript
        self.settings = transcript.settings
        self._request: EngineRequest | None = None
        self._num_requests = 0
        self._latest: Image.Image | None = None
        self._is_unfinished = False
        self._is_closed = False

    async def caption(
        self, image: Image.Image, timestamp: float, arrived_s: float | None = None
    ) -> AsyncIterator[TextDelta | FrameResult]:
        """Caption a frame; the last item is the `FrameResult`.

        Args:
            image: The frame.
            timestamp: Its time in the video, in seconds.
            arrived_s: When it arrived, on the monotonic clock; None is now.

        Raises:
            InputError: The image is invalid; the session goes on without it.
            RequestLostError: The engine lost the session again and again.
        """

        def next_chunk() -> Chunk:
            self.transcript.make_room(self.transcript.frame_tokens)
            return self.transcript.frame_chunk()

        progress = Progress()
        async for text in self._answer(next_chunk, image, timestamp, progress):
            yield TextDelta(text)
        common = progress.common_fields(self.engine.format.stop_ids)
        queue_ms = 0.0 if arrived_s is None else 1000 * (progress.started_s - arrived_s)
        yield FrameResult(
            timestamp=timestamp,
            caption=progress.entry.text,
            queue_ms=queue_ms,
            delay_ms=queue_ms + common["total_ms"],
            text_tokens=self.transcript.num_tokens,
            image_tokens=progress.image_tokens,
            image_pages=self.engine.pages.image_pages(progress.image_tokens),
            kv_bytes=self.engine.pages.session_bytes(self.transcript.num_tokens, progress.image_tokens),
            insertion_bytes=self.engine.pages.insertion_bytes(progress.image_tokens),
            **common,
        )

    async def ask(self, question: str) -> AsyncIterator[TextDelta | AnswerResult]:
        """Ask a question; the last item is the `AnswerResult`.

        Raises:
            InputError: The question is too long or no plain text; the session goes on without it.
            RequestLostError: The engine lost the session again and again.
        """
        progress = Progress()
        async for text in self._answer(lambda: self.transcript.question_chunk(question), None, None, progress):
            yield TextDelta(text)
        yield AnswerResult(
            answer=progress.entry.text,
            text_tokens=self.transcript.num_tokens,
            **progress.common_fields(self.engine.format.stop_ids),
        )

    async def close(self) -> None:
        """Free everything in the engine, also in the middle of a frame. Idempotent."""
        self._is_closed = True
        # Releases its pixels from the process's budget; the session object may live on for a while.
        self._latest = None
        await self._drop_request()

    async def _answer(
        self,
        next_chunk: Callable[[], Chunk],
        image: Image.Image | None,
        timestamp: float | None,
        progress: Progress,
    ) -> AsyncIterator[str]:
        """Yield pieces of the answer; if the engine loses the session, prefill the text again and go on."""
        if self._is_closed:
            raise InputError("the session is closed; expected an open one: open another with its history.")
        if self._is_unfinished:
            # The previous frame or question was cancelled.
            self.transcript.reset()
            progress.restarts += 1
        num_known = self.transcript.num_known
        while True:
            chunk = next_chunk()
            progress.trimmed |= self.transcript.num_known < num_known
            try:
                async for text in self._generate(chunk, image, progress):
                    yield text
                break
            except RequestLostError:
                progress.restarts += 1
                if self._is_closed or progress.restarts > MAX_RESTARTS:
                    raise
                self.transcript.reset()
                num_known = 0
                progress.token_ids.clear()
        progress.entry = self.transcript.record(chunk, progress.token_ids, timestamp)
        self._latest = image or self._latest

    async def _generate(self, chunk: Chunk, image: Image.Image | None, progress: Progress) -> AsyncIterator[str]:
        rendered = await self.engine.render(chunk, chunk.images(self._latest, image))
        for placed in rendered.get("mm_placeholders", {}).get("image", ()):
            progress.image_tokens = placed.get_num_embeds()
        if self.transcript.num_known == 0:
            await self._drop_request()
        params = self._sampling_params(chunk)
        if self._request is None:
            self._request = EngineRequest(self.engine.engine, params)
            self._num_requests += 1
        self._is_unfinished = True
        async for completion in self._request.generate(rendered, params):
            progress.add(completion.token_ids)
            if text := progress.delta(self.transcript.text_of(chunk, progress.token_ids)):
                yield text
        self._is_unfinished = False

    def _sampling_params(self, chunk: Chunk) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings, transcript = self.settings, self.transcript
        neutral = transcript.rules.is_neutral
        return SamplingParams(
            temperature=settings.temperature,
            top_k=settings.top_k,
            # Every request has a new random generator: a restarted session must not repeat its numbers.
            seed=None if settings.seed is None else (settings.seed + self._num_requests) % 2**63,
            max_tokens=chunk.max_tokens,
            stop_token_ids=list(self.engine.format.stop_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=None if neutral else {EXTRA_ARG: to_dict(chunk.state, transcript.rules)},
        )

    async def _drop_request(self) -> None:
        self._is_unfinished = False
        if self._request is not None:
            request, self._request = self._request, None
            await request.close()
