"""Converts prompts with images to the inputs of vLLM's engine.

In the CA fusions the image markers are removed from the stream and an image is attached to a position
instead: to the first token after it, by a placeholder of one text position whose mask is longer
than the placeholder:

    prompt    hello <start> <pad> <end> world          (<pad> is the marker)
    stream    hello <start> <end> world
    image     PlaceholderRange(offset=2, length=1, is_embed=ones(N))

vLLM counts masks (N tokens for the encoder budget, the input checks and the admission of
requests) and hashes text blocks by offset and length, so that the text prefix cache stays correct.
The offset may be the prompt's length: then only generated tokens see the image. That a mask may be
longer than its range is not documented; tests/vllm/test_limits.py checks it.

Parsing and caching of images is in image_items.py.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import BatchFeature
from vllm.inputs import mm_input
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)

from casa_engine.configuration import CasaConfig
from casa_engine.processing_casa import CasaProcessor
from casa_engine.rope import image_token_counts
from casa_engine.windows import split_image_markers
from casa_vllm import compat
from casa_vllm.image_cache_spec import ImageLimits
from casa_vllm.image_items import ImageItemCache, ImageParser, content_key, unknown_name

# Default of the most image tokens in a prompt; `--hf-overrides` sets the configuration's own value.
DEFAULT_MAX_PROMPT_TOKENS = 262_144
MAX_PROMPT_IMAGES = 1024
# Images of all prompts that are decoded and resized concurrently, each with its full-size pixels in memory:
# see docs/limits.md.
MAX_DECODERS = 4


@functools.cache
def decoders() -> ThreadPoolExecutor:
    """Return the threads in which images are decoded and resized: those of the process, which has two processors."""
    return ThreadPoolExecutor(min(MAX_DECODERS, len(os.sched_getaffinity(0))), "casa-image")


# A forked process has none of them.
os.register_at_fork(after_in_child=decoders.cache_clear)


class CasaProcessingInfo(BaseProcessingInfo):
    """Information for vLLM about the model's inputs."""

    def get_hf_config(self) -> CasaConfig:
        """Return the checkpoint's configuration."""
        return self.ctx.get_hf_config(CasaConfig)

    def get_hf_processor(self, **kwargs: object) -> CasaProcessor:
        """Return the checkpoint's processor."""
        return self.ctx.get_hf_processor(CasaProcessor, **kwargs)

    def get_data_parser(self) -> ImageParser:
        """Return the parser of images."""
        return ImageParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return no limit on the number of images."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the tokens of the largest image, which sizes the encoder budget."""
        return {"image": self.get_max_image_tokens()}

    def get_max_image_tokens(self) -> int:
        """Return the tokens of the largest image after the image processor."""
        return self.get_hf_processor().max_image_tokens

    def get_max_image_size(self) -> tuple[int, int]:
        """Return (width, height) in pixels of an image with that many tokens."""
        tokens, side = self.get_max_image_tokens(), self._token_side()
        rows = max(row for row in range(1, int(tokens**0.5) + 1) if tokens % row == 0)
        if tokens // rows > 100 * rows:  # a prime number of tokens; nearly as many in a square
            rows = int(tokens**0.5)
        return tokens // rows * side, rows * side

    def image_limits(self) -> ImageLimits:
        """Return the limits on the images of a prompt."""
        config, largest = self.get_hf_config(), self.get_max_image_tokens()
        budget = getattr(config, "vllm_encoder_budget", largest)
        allowed = getattr(config, "max_prompt_image_tokens", DEFAULT_MAX_PROMPT_TOKENS)
        return ImageLimits(
            step_tokens=max(budget, largest),
            max_prompt_tokens=max(allowed, largest),
            max_prompt_images=min(self.allowed_mm_limits.get("image", 0), MAX_PROMPT_IMAGES) or 1,
        )

    def _token_side(self) -> int:
        vision = self.get_hf_config().vision_config
        return vision.patch_size * vision.spatial_merge_size


class CasaDummyInputs(BaseDummyInputsBuilder[CasaProcessingInfo]):
    """The largest inputs, for vLLM's profiling."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return one marker for each image."""
        # Text between images, as in a prompt: adjacent ones would share a window.
        return f"x{self.info.get_hf_processor().image_token}" * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return images of the largest size."""
        width, height = self.info.get_max_image_size()
        images = self._get_dummy_images(
            width=width,
            height=height,
            num_images=mm_counts.get("image", 0),
            overrides=mm_options.get("image"),
        )
        return {"image": images}


class CasaMultiModalProcessor(BaseMultiModalProcessor[CasaProcessingInfo]):
    """Runs the image processor and places images in the prompt."""

    def __init__(self, info: CasaProcessingInfo, dummy_inputs: CasaDummyInputs, **options: Any) -> None:
        """Constructor called by vLLM; replaces its cache, if there is one, by `ImageItemCache`."""
        self._kept = ImageItemCache(info.ctx.model_config)
        if options.get("cache") is not None:
            options["cache"] = self._kept
        super().__init__(info, dummy_inputs, **options)

    def clear_cache(self) -> None:
        """Drop every image that is kept, and the names that clients gave."""
        self._kept.clear_cache()

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Hook called by vLLM: one rendered prompt with its images.

        Raises:
            ValueError: Markers and images differ in number, or there are too many image tokens.
        """
        config = self.info.get_hf_config()
        if inputs.hf_processor_mm_kwargs:
            # They could resize any image to any size.
            raise ValueError(
                f"mm_processor_kwargs {sorted(inputs.hf_processor_mm_kwargs)} are given; expected "
                "none: a CASA checkpoint fixes how its images are processed."
            )
        num_images = inputs.mm_data_items.get_all_counts().get("image", 0)
        num_markers = list(inputs.prompt).count(config.image_token_id)
        CasaProcessor.check_counts(num_markers, num_images)
        if not config.is_cross_attention:
            return super().apply(inputs, timing_ctx)
        result = self._cached_apply_hf_processor(inputs, timing_ctx)
        updates = result.prompt_updates.get("image", [])
        counts = [len(update[0].content.full) for update in updates]
        stream, points = split_image_markers(list(inputs.prompt), config.image_token_id)
        self._check_limits(points, counts, len(stream))
        ranges = [
            PlaceholderRange(point, 1, torch.ones(count, dtype=torch.bool))
            for point, count in zip(points, counts, strict=True)
        ]
        return mm_input(
            prompt_token_ids=stream,
            mm_kwargs=result.kwargs,
            mm_hashes=result.hashes,
            mm_placeholders={"image": ranges} if ranges else {},
        )

    def _check_limits(self, points: list[int], counts: list[int], num_text: int) -> None:
        limits = self.info.image_limits()
        if num_text == 0:
            raise ValueError(
                "the prompt has no text token beside its images; expected at least one: use the model's chat template."
            )
        if sum(counts) > limits.max_prompt_tokens or len(counts) > limits.max_prompt_images:
            raise ValueError(
                f"the prompt has {len(counts)} images with {sum(counts)} image tokens; expected "
                f"up to {limits.max_prompt_images} with {limits.max_prompt_tokens}: send fewer "
                "or smaller images."
            )
        limits.check_windows(points, counts)

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        """Hook called by vLLM: returns the request's images, each processed or from the cache."""
        if inputs.mm_data_items.get_all_counts().get("image", 0) == 0:
            return compat.processing_result(inputs, MultiModalKwargsItems({}), {}, {})
        images = inputs.mm_data_items["image"].data
        names = (inputs.mm_uuid_items or {}).get("image") or [None] * len(images)
        kept = self._kept if compat.keeps_items(self, inputs) else None
        with timing_ctx.record("get_mm_hashes"):
            keys = self._keys(images, names, kept)
        with timing_ctx.record("apply_hf_processor"):
            items = self._items(images, keys, kept)
        if kept is not None:
            for name, key in zip(names, keys, strict=True):
                if name is not None:
                    kept.name(name, key)
        kwargs = MultiModalKwargsItems({"image": [items[key] for key in keys]})
        updates = self._get_mm_prompt_updates(inputs.mm_data_items, {}, kwargs)
        return compat.processing_result(inputs, kwargs, {"image": keys}, updates)

    def _keys(self, images: Sequence[Any], names: Sequence[str | None], kept: ImageItemCache | None) -> list[str]:
        """Return content keys: of the images, or of the names of those that were given by name alone."""
        sent = [None if image is None else content_key(image, self.info.model_id) for image in images]
        by_name = {name: key for name, key in zip(names, sent, strict=True) if key is not None}
        keys = []
        for index, (key, name) in enumerate(zip(sent, names, strict=True)):
            if key is None and name is not None:
                key = by_name.get(name) or (kept and kept.key_of(name))
            if key is None:
                raise unknown_name(index)
            keys.append(key)
        return keys

    def _items(
        self, images: Sequence[Any], keys: Sequence[str], kept: ImageItemCache | None
    ) -> dict[str, MultiModalKwargsItem]:
        """Return processed images by content key: from the cache, or processed and added to it now."""
        # References, so that images of this request that its own others evict from the cache are not lost.
        found = {key: None if kept is None else kept.get(key) for key in keys}
        sent = {key: image for key, image in zip(keys, images, strict=True) if image is not None}
        missing = [key for key, item in found.items() if item is None]
        for key in missing:
            if key not in sent:
                raise unknown_name(keys.index(key))
        processed = dict(zip(missing, decoders().map(self._process, map(sent.get, missing)), strict=True))
        if kept is not None:
            for key, item in processed.items():
                kept.put(key, item)
        return {**found, **processed}

    def _process(self, image: Any) -> MultiModalKwargsItem:
        """Decode an image if necessary and resize it. Its item shares no memory with others."""
        pixels, grid = self.info.get_hf_processor().image_bytes(image)
        inputs = BatchFeature({"pixel_values": pixels, "image_grid_thw": grid[None]})
        return MultiModalKwargsItems.from_hf_inputs(inputs, self._get_mm_fields_config(inputs, {}))["image"][0]

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        grids = hf_inputs.get("image_grid_thw", torch.empty((0, 3), dtype=torch.long))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", grids.prod(-1)),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: Any,
    ) -> Sequence[PromptUpdate]:
        """Hook called by vLLM: a marker becomes the image's N tokens, of which the CA fusions use only N."""
        config = self.info.get_hf_config()

        def image_tokens(item: int) -> list[int]:
            grid = out_mm_kwargs["image"][item]["image_grid_thw"].data
            (count,) = image_token_counts(grid[None], config.vision_config.spatial_merge_size)
            return [config.image_token_id] * count

        return [PromptReplacement(modality="image", target=[config.image_token_id], replacement=image_tokens)]
