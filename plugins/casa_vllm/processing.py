"""Prompts with images -> what vLLM's engine takes.

In the CA fusions the image markers leave the stream and an image is attached to a position
instead: to the first token after it, by a placeholder of one text position whose mask is longer
than the placeholder:

    prompt    hello <start> <pad> <end> world          (<pad> is the marker)
    stream    hello <start> <end> world
    image     PlaceholderRange(offset=2, length=1, is_embed=ones(N))

vLLM counts masks (N tokens for the encoder budget, the input checks and the admission of
requests) and hashes text blocks by offset and length, so that the text prefix cache stays right.
The offset may be the prompt's length: the image is seen by what is generated. That a mask may be
longer than its range is not documented; tests/vllm/test_limits.py holds vLLM to it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from vllm.inputs import mm_input
from vllm.multimodal.inputs import MultiModalFieldConfig, PlaceholderRange
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)

from casa_engine.configuration import CasaConfig
from casa_engine.processing_casa import CasaProcessor
from casa_engine.windows import split_image_markers
from casa_vllm import compat
from casa_vllm.image_cache_spec import MAX_IMAGES_PER_WINDOW, ImageLimits

# Image tokens that a prompt may bring; `--hf-overrides` sets the configuration's own value.
DEFAULT_MAX_PROMPT_TOKENS = 262_144
MAX_PROMPT_IMAGES = 1024


class CasaProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about the model's inputs."""

    def get_hf_config(self) -> CasaConfig:
        """The checkpoint's configuration."""
        return self.ctx.get_hf_config(CasaConfig)

    def get_hf_processor(self, **kwargs: object) -> CasaProcessor:
        """The checkpoint's processor."""
        return self.ctx.get_hf_processor(CasaProcessor, **kwargs)

    def get_data_parser(self) -> MultiModalDataParser:
        """Stock parsing of images."""
        return MultiModalDataParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Sizes the encoder budget."""
        return {"image": self.get_max_image_tokens()}

    def get_max_image_tokens(self) -> int:
        """Tokens of the largest image that the image processor lets through."""
        return self._max_pixels() // self._token_side() ** 2

    def get_max_image_size(self) -> tuple[int, int]:
        """(width, height) in pixels of an image with that many tokens."""
        tokens, side = self.get_max_image_tokens(), self._token_side()
        rows = max(row for row in range(1, int(tokens**0.5) + 1) if tokens % row == 0)
        if tokens // rows > 100 * rows:  # a prime number of tokens; nearly as many in a square
            rows = int(tokens**0.5)
        return tokens // rows * side, rows * side

    def image_limits(self) -> ImageLimits:
        """How many images a prompt may bring."""
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

    def _max_pixels(self) -> int:
        return self.get_hf_processor().image_processor.size["longest_edge"]


class CasaDummyInputs(BaseDummyInputsBuilder[CasaProcessingInfo]):
    """The largest inputs, for vLLM's profiling."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """One marker for each image."""
        # Text between images, as in a prompt: adjacent ones would share a window.
        return f"x{self.info.get_hf_processor().image_token}" * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Images of the largest size."""
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

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """VLLM's hook: one rendered prompt with its images.

        Raises:
            ValueError: Markers and images differ in number, or there are too many image tokens.
        """
        config = self.info.get_hf_config()
        if inputs.hf_processor_mm_kwargs:
            # They could scale any image up to any size.
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
        try:
            self._check_limits(points, counts, len(stream))
        except ValueError:
            # vLLM believes by now that the engine has these images in its cache.
            cache = compat.sender_cache(self, inputs)
            for content_hash in result.hashes.get("image", ()) if cache is not None else ():
                cache.invalidate(content_hash)
            raise
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
        for point in set(points):
            window = [count for at, count in zip(points, counts, strict=True) if at == point]
            if sum(window) > limits.step_tokens or len(window) > MAX_IMAGES_PER_WINDOW:
                raise ValueError(
                    f"{len(window)} adjacent images share one window and have {sum(window)} "
                    f"tokens; expected up to {MAX_IMAGES_PER_WINDOW} with {limits.step_tokens}: "
                    "put text between them, or raise --max-num-batched-tokens."
                )

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, *args: object, **kwargs: object) -> BatchFeature:
        """Runs CASA's image processing; there is no text to process with it."""
        if mm_items.get_all_counts().get("image", 0) == 0:
            return BatchFeature()
        return BatchFeature(self.info.get_hf_processor().process_images(mm_items["image"].get_all()))

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
        """A marker becomes the image's N tokens; the CA fusions only take N from it."""
        config = self.info.get_hf_config()
        merge = config.vision_config.spatial_merge_size

        def image_tokens(item: int) -> list[int]:
            grid = out_mm_kwargs["image"][item]["image_grid_thw"].data
            return [config.image_token_id] * (int(grid.prod()) // merge**2)

        return [PromptReplacement(modality="image", target=[config.image_token_id], replacement=image_tokens)]
