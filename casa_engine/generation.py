"""How transformers' `generate` runs on CASA: its hooks for the cache, for beams and for conversations that grow."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from casa_engine.cache import CasaCache, check_cache
from casa_engine.cache_argument import CACHE_ARGUMENT, pop_cache
from casa_engine.call_inputs import CallInputs, pad_left
from casa_engine.continuation import add_insertion_points, find_continuation, select_images
from casa_engine.errors import InputError
from casa_engine.token_ids import list_token_ids

IMAGE_CONTENT = ("pixel_values", "image_embeds", "image_grid_thw")
IMAGE_ARGUMENTS = (*IMAGE_CONTENT, "insertion_points")
PADDING_IDS = "padding_ids"


class CasaGenerationMixin(GenerationMixin):
    """`GenerationMixin` with the hooks of a model whose images are outside the text stream."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates as `GenerationMixin.generate` does; a cache may be given under either of its names.

        With a cache that has read the beginning of the conversation, the whole conversation is passed again: cached
        text and images are recognised and left out (`casa_engine.continuation`).

        Raises:
            InputError: As `forward`; or the conversation is not the cached one's continuation.
        """
        cache = pop_cache(kwargs)
        input_ids = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs"))
        if input_ids is not None:
            mask = kwargs.get("attention_mask")
            # A mask as long as the ids is that of a whole conversation; a longer one covers the cached tokens too.
            whole = cache is None or mask is None or getattr(mask, "shape", None) == getattr(input_ids, "shape", None)
            self._check(input_ids, mask, kwargs, None if whole else cache)
        return super().generate(*args, **kwargs, **({} if cache is None else {CACHE_ARGUMENT: cache}))

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        """Hook called by GenerationMixin for models with a cache of their own."""
        if generation_config.prefill_chunk_size is not None and _given(model_kwargs):
            raise InputError("prefill_chunk_size cuts text and not the images between; leave it out.")
        if generation_config.cache_implementation is not None:
            raise InputError(
                f"cache_implementation is {generation_config.cache_implementation!r}; CASA has one cache, CasaCache: "
                "leave it out."
            )
        if (cache := model_kwargs.get(CACHE_ARGUMENT)) is not None:
            check_cache(cache)
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            model_kwargs[PADDING_IDS] = _padding_ids(generation_config) | _padding_ids(self.generation_config)
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE_ARGUMENT] = CasaCache(self.config)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Hook called by GenerationMixin for several answers to one prompt: its images go with each, encoded once."""
        images = _given(model_kwargs)
        if expand_size == 1 or not images:
            return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        if (mask := model_kwargs.get("attention_mask")) is not None:
            mask = mask[:, -input_ids.shape[1] :]  # new tokens alone come with the mask of the cached ones too
        inputs = self._check(input_ids, mask, images)
        if "pixel_values" in images:
            pixels, grids = images.pop("pixel_values").to(self.device), images["image_grid_thw"].to(self.device)
            images["image_embeds"] = self.model.encode_images(pixels, grids).to(input_ids.device)
        chosen = [image for row in inputs.images.by_row for _ in range(expand_size) for image in row]
        points = [row for row in inputs.images.points for _ in range(expand_size)]
        rest = {name: value for name, value in model_kwargs.items() if name not in IMAGE_ARGUMENTS}
        input_ids, rest = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **rest)
        return input_ids, rest | self._images(select_images(images, inputs, chosen), points, input_ids.device)

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, is_first_iteration=False, attention_mask=None, **kwargs
    ):
        """Hook called by GenerationMixin: passes images with the prompt, once; of a grown conversation what is new.

        Rows that are padded on the right are padded on the left instead: the next token follows the last column.
        """
        cache, padding_ids = kwargs.get(CACHE_ARGUMENT), kwargs.pop(PADDING_IDS, set())
        if cache is not None and not is_first_iteration:
            kwargs = {name: value for name, value in kwargs.items() if name not in IMAGE_ARGUMENTS}
            attention_mask = None  # what `generate` appends is real
        elif isinstance(cache, CasaCache) and cache.get_seq_length() and next_sequence_length is not None:
            # transformers would cut the columns that are new and pass all images: it handles neither rows nor images.
            input_ids, attention_mask, kwargs = self._new_part(cache, input_ids, attention_mask, padding_ids, kwargs)
            next_sequence_length = None
        elif attention_mask is not None and attention_mask.shape == input_ids.shape:
            input_ids, attention_mask = pad_left(input_ids, attention_mask)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            is_first_iteration=is_first_iteration,
            attention_mask=attention_mask,
            **kwargs,
        )

    def _new_part(
        self,
        cache: CasaCache,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        padding_ids: set[int],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Returns the ids, mask and other arguments of what a cache has not read of a conversation."""
        images = _given(kwargs)
        inputs = self._check(input_ids, attention_mask, images)
        new = find_continuation(cache, input_ids, inputs, padding_ids)
        new.apply(cache)
        selected = self._images(select_images(images, inputs, new.images), new.points, input_ids.device)
        rest = {name: value for name, value in kwargs.items() if name not in (*IMAGE_ARGUMENTS, "position_ids")}
        return new.input_ids, new.attention_mask, rest | selected

    def _check(
        self, input_ids: Tensor, mask: Tensor | None, arguments: dict[str, Any], cache: CasaCache | None = None
    ) -> CallInputs:
        """Checks what `generate` was given, which may lie on the CPU: transformers moves it before each call."""
        on_cpu = isinstance(input_ids, Tensor) and input_ids.device.type == "cpu"
        device = input_ids.device if on_cpu else self.device
        return self.model.check_inputs(input_ids, cache, device, attention_mask=mask, **_given(arguments))

    def _images(self, content: dict[str, Tensor], points: list[list[int]], device: torch.device) -> dict[str, Tensor]:
        """Returns a call's image arguments: with insertion points where the fusion takes them."""
        return add_insertion_points(content, points, device) if self.config.is_cross_attention else content


def _given(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the image arguments among these."""
    return {name: arguments[name] for name in IMAGE_ARGUMENTS if arguments.get(name) is not None}


def _padding_ids(generation_config: GenerationConfig) -> set[int]:
    """Returns the ids that `generate` writes behind the end of a row: the padding token, or a stop token instead."""
    return {*list_token_ids(generation_config.pad_token_id), *list_token_ids(generation_config.eos_token_id)}
