"""`--backend eager`: the reference model in PyTorch, one conversation at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from casa_bench.backend import Answer, Message, Needs, Turn, refuse_concurrency
from casa_bench.frame_chunks import FrameChunks
from casa_bench.process_use import Meter
from casa_engine.cache import CasaCache
from casa_engine.checkpoints import load_model, load_processor
from casa_engine.live.stream_format import StreamFormat
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.originals.views import resolve_checkpoint
from casa_engine.rope import image_token_counts
from casa_engine.streaming import CasaStream, LogitsProcessor


class EagerBackend:
    """See `Backend`.

    Args:
        folder: The checkpoint.
        needs: What will be asked at most.
        dtype: Of weights and cache; "auto" for the checkpoint's own.

    Raises:
        CheckpointError: The folder holds no CASA model.
        InputError: Several conversations at once are asked for.
    """

    name = "eager"

    def __init__(self, folder: Path, needs: Needs, dtype: torch.dtype | Literal["auto"]) -> None:
        refuse_concurrency(needs)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = resolve_checkpoint(folder)
        self.model, self.processor = load_model(folder, dtype).to(device), load_processor(folder)
        self.format = StreamFormat.from_checkpoint(folder)
        self._without_image = image_ban(self.format.image_token_id)
        self.about = {
            "fusion": self.model.config.fusion,
            "device": device,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def open_stream(self) -> EagerStream:
        """See `Backend`."""
        return EagerStream(self.model, self.format)

    def answer(self, chats: Sequence[Sequence[Message]], num_tokens: int) -> list[Answer]:
        """See `Backend`; one after the other."""
        return [self._answer(list(messages), num_tokens) for messages in chats]

    def close(self) -> None:
        """See `Backend`."""
        del self.model

    @torch.inference_mode()
    def _answer(self, messages: list[Message], num_tokens: int) -> Answer:
        begun_s = time.perf_counter()
        batch = self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        ).to(self.model.device)
        cache, said, first_s = self.model.new_cache(), [], 0.0
        for _ in range(num_tokens):
            output = self.model(**batch, past_key_values=cache, logits_to_keep=1)
            said.append(int(self._without_image(said, output.logits[:, -1]).argmax()))
            first_s = first_s or time.perf_counter()
            batch = {"input_ids": torch.tensor([said[-1:]], device=self.model.device)}
        total_ms = 1000 * (time.perf_counter() - begun_s)
        text = self.processor.tokenizer.decode(said, skip_special_tokens=True)
        return Answer(text, 1000 * (first_s - begun_s), total_ms, num_tokens)


class EagerStream:
    """See `Stream`: the protocol of the published speed benchmark.

    Every token but a turn's last is forwarded, then one stop token in a forward of its own, which is not timed.
    """

    def __init__(self, model: CasaForConditionalGeneration, format: StreamFormat) -> None:
        self.model, self.format = model, format
        # End tokens that are chosen by chance end nothing: a turn has exactly its number of tokens.
        self._stream = CasaStream(model, stop_token_ids=())
        self._without_image = image_ban(format.image_token_id)
        self._chunks = FrameChunks(format, folds_stop=False)
        self._meter = Meter(on_gpu=model.device.type == "cuda")

    def turn(self, frame: Image.Image, num_tokens: int) -> Turn:
        """See `Stream`."""
        self._meter.start()
        begun_s = time.perf_counter()
        ids, images = self._prepare(frame)
        prepared_s = time.perf_counter()
        self._stream.feed(ids, **images)
        self._synchronize()
        first_s = time.perf_counter()
        self._stream.generate(num_tokens - 1, [self._without_image])
        self._synchronize()
        last_s = time.perf_counter()
        cpu_ms, memory_bytes = self._meter.read()
        self._stream.feed([self.format.stop_ids[0]])
        cache = self._stream.cache
        return Turn(
            ttft_ms=1000 * (first_s - prepared_s),
            decode_ms=1000 * (last_s - first_s),
            tokens=num_tokens,
            prepare_ms=1000 * (prepared_s - begun_s),
            cpu_ms=cpu_ms,
            kv_tokens=cache.get_seq_length(),
            kv_bytes=cache_bytes(cache),
            memory_bytes=memory_bytes,
        )

    def close(self) -> None:
        """See `Stream`."""
        del self._stream

    def _prepare(self, frame: Image.Image) -> tuple[list[int], dict[str, Any]]:
        """Return ids and images as `CasaStream.feed` takes them."""
        prepared = self.format.processor.process_images([frame])
        images = {name: tensor.to(self.model.device) for name, tensor in prepared.items()}
        if self.model.config.is_cross_attention:
            ids, point = self._chunks.next(0)
            return ids, {**images, "insertion_points": [point]}
        merge_size = self.model.config.vision_config.spatial_merge_size
        (count,) = image_token_counts(images["image_grid_thw"], merge_size)
        return self._chunks.next(count)[0], images

    def _synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


def image_ban(image_token_id: int) -> LogitsProcessor:
    """Return what keeps a model with random weights from saying an image marker, which only images may stand for."""

    def ban(ids: Sequence[int], logits: Tensor) -> Tensor:
        del ids
        if image_token_id >= logits.shape[-1]:  # the marker of an original whose own tokenizer has none
            return logits
        return logits.index_fill(-1, torch.tensor([image_token_id], device=logits.device), float("-inf"))

    return ban


def cache_bytes(cache: CasaCache) -> int:
    """Return the bytes of every key and value that a cache holds: text, text of `ca_tv`'s windows, images."""
    layers = [layer for layer in (*cache.layers, *cache.ca_text) if layer.is_initialized]
    text = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in (*text, *cache.window_keys.values(), *cache.window_values.values()))
