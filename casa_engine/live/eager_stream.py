"""Live captioning with the eager model: the reference that sessions in an engine are compared with."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from casa_engine.cache import CasaCache
from casa_engine.live.caption_logits import caption_logits
from casa_engine.live.settings import LiveSettings
from casa_engine.live.stream_format import StreamFormat
from casa_engine.live.transcript import Chunk, Entry, HistoryItem, Transcript
from casa_engine.modeling_casa import CasaForConditionalGeneration


class EagerStream:
    """One session: a transcript and the cache that has read it.

    Args:
        model: The eager model.
        format: How its checkpoint spells a stream.
        settings: What is asked.
        history: What was said before, in words.
    """

    def __init__(
        self,
        model: CasaForConditionalGeneration,
        format: StreamFormat,
        settings: LiveSettings,
        history: Sequence[HistoryItem] = (),
    ) -> None:
        self.model, self.format, self.settings = model, format, settings
        self.transcript = Transcript(format, settings, history)
        self._cache = CasaCache(model.config)
        self._latest: Image.Image | None = None
        self._generator = torch.Generator(device=model.device)
        if settings.seed is not None:
            self._generator.manual_seed(settings.seed)

    def caption(self, frame: Image.Image, timestamp: float | None = None) -> str:
        """Show one frame; return what the model says to it, "" for silence."""
        self.transcript.make_room(self.transcript.frame_tokens)
        said = self._answer(self.transcript.frame_chunk(), frame, timestamp)
        self._latest = frame
        return said.text

    def ask(self, question: str) -> str:
        """Ask about what was seen and said; return the answer."""
        return self._answer(self.transcript.question_chunk(question), None, None).text

    @torch.inference_mode()
    def _answer(self, chunk: Chunk, frame: Image.Image | None, timestamp: float | None) -> Entry:
        if self.transcript.num_known == 0:
            self._cache = CasaCache(self.model.config)
        shown = chunk.images(self._latest, frame)
        images: dict[str, Any] = dict(self.format.processor.process_images(shown)) if shown else {}
        if images and self.model.config.is_cross_attention:
            images["insertion_points"] = torch.tensor([chunk.insertion_points])
        logits = self._step(chunk.token_ids, **images)
        generated: list[int] = []
        state, rules = chunk.state, self.transcript.rules
        while True:
            state = state.decay_counts(rules)
            generated.append(self._choose(logits if rules.is_neutral else caption_logits(logits, state, rules)))
            if generated[-1] in self.format.stop_ids or len(generated) == chunk.max_tokens:
                return self.transcript.record(chunk, generated, timestamp)
            logits = self._step(generated[-1:])
            state = state.read(generated[-1:], rules)

    def _step(self, ids: Sequence[int], **images: Tensor) -> Tensor:
        """Logits float32 (V,) after more text."""
        tensor = torch.tensor([list(ids)], device=self.model.device)
        output = self.model(tensor, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **images)
        return output.logits[0, -1].float()

    def _choose(self, logits: Tensor) -> int:
        if self.settings.temperature == 0:
            return int(logits.argmax())
        logits = logits / self.settings.temperature
        if 0 < self.settings.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(self.settings.top_k).values[-1], float("-inf"))
        return int(torch.multinomial(logits.softmax(-1), 1, generator=self._generator))
