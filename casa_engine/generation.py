"""How transformers' `generate` runs on CASA: its hooks for the cache, for beams and for conversations that grow."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.generation import CandidateGenerator

from casa_engine.cache import CasaCache, check_cache
from casa_engine.cache_argument import CACHE_ARGUMENT, pop_cache
from casa_engine.call_inputs import CallInputs, pad_left
from casa_engine.continuation import add_insertion_points, find_continuation, select_images
from casa_engine.errors import InputError
from casa_engine.token_ids import list_token_ids

IMAGE_CONTENT = ("pixel_values", "image_embeds", "image_grid_thw")
IMAGE_ARGUMENTS = (*IMAGE_CONTENT, "insertion_points")
EMBEDDINGS = "inputs_embeds"
PADDING_IDS = "padding_ids"
IS_WHOLE = "is_whole_conversation"
# What `generate` passes on besides: positions in transformers' columns (the model's follow from the mask), and
# tokenizers, by which it finds stop strings.
NOT_OF_FORWARD = ("position_ids", "tokenizer", "assistant_tokenizer")


class CasaGenerationMixin(GenerationMixin):
    """`GenerationMixin` with the hooks of a model whose images are outside the text stream."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as `GenerationMixin.generate` does; a cache may be given under either of its names.

        With a cache that has read the beginning of the conversation, the whole conversation is passed again: cached
        text and images are recognised and left out (`casa_engine.continuation`).

        Raises:
            InputError: As `forward`; or the conversation is not the cached one's continuation.
        """
        cache = pop_cache(kwargs)
        input_ids = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs"))
        mask = kwargs.get("attention_mask")
        if kwargs.get("inputs_embeds") is not None:
            self._check_embeddings(input_ids, cache, kwargs)
        elif input_ids is not None:
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

    def _check_embeddings(self, input_ids: Tensor | None, cache: CasaCache | None, arguments: dict[str, Any]) -> None:
        """Check a call of `generate` with embeddings in place of ids, which is always a conversation's first."""
        if cache is not None and cache.get_seq_length():
            raise InputError("got inputs_embeds over a cache; what goes on is recognised by its ids: pass input_ids.")
        config = arguments.get("generation_config") or self.generation_config
        if arguments.get("use_cache", config.use_cache) is False:
            raise InputError("got inputs_embeds without a cache, in which alone they last: leave use_cache out.")
        self._check(input_ids, arguments.get("attention_mask"), arguments)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Hook called by GenerationMixin for several answers to one prompt: its images go with each, encoded once."""
        images = _given(model_kwargs)
        if expand_size == 1 or not images:
            return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        mask, embeddings = model_kwargs.get("attention_mask"), model_kwargs.get(EMBEDDINGS)
        if embeddings is not None:
            mask = _mask_of(embeddings, mask)
        elif mask is not None:
            mask = mask[:, -input_ids.shape[1] :]  # new tokens alone come with the mask of the cached ones too
        inputs = self._check(input_ids if embeddings is None else None, mask, images | {EMBEDDINGS: embeddings})
        if "pixel_values" in images:
            pixels, grids = images.pop("pixel_values").to(self.device), images["image_grid_thw"].to(self.device)
            images["image_embeds"] = self.model.encode_images(pixels, grids).to(input_ids.device)
        chosen = [image for row in inputs.images.by_row for _ in range(expand_size) for image in row]
        points = [row for row in inputs.images.points for _ in range(expand_size)]
        rest = {name: value for name, value in model_kwargs.items() if name not in IMAGE_ARGUMENTS}
        input_ids, rest = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **rest)
        return input_ids, rest | self._images(select_images(images, inputs, chosen), points, input_ids.device)

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        """Hook called by GenerationMixin: with `insertion` the image token stands for pixels and is never written.

        Prompt lookup, which repeats pieces of the prompt, asks these processors too.
        """
        processors = super()._get_logits_processor(*args, **kwargs)
        if not self.config.is_cross_attention:
            # First: behind `top_k` or `top_p`, of which the image token may be all that is left, nothing would be left.
            processors.insert(0, SuppressTokensLogitsProcessor([self.config.image_token_id], device=self.device))
        return processors

    def _get_candidate_generator(self, *, generation_config, input_ids, model_kwargs, **kwargs) -> CandidateGenerator:
        """Hook called by GenerationMixin for assisted generation, before the first step.

        It notes what `_prefill`, which assisted generation does without, finds out: whether the ids are a whole
        conversation, or new tokens alone, with a mask that covers the cached ones too.
        """
        if kwargs.get("assistant_model") is not None:
            self._check_text_behind_images(input_ids, model_kwargs)
        own = {name: model_kwargs.pop(name) for name in (PADDING_IDS,) if name in model_kwargs}
        generator = super()._get_candidate_generator(
            generation_config=generation_config, input_ids=input_ids, model_kwargs=model_kwargs, **kwargs
        )
        if own:
            mask = model_kwargs.get("attention_mask")
            length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
            model_kwargs |= own | {IS_WHOLE: length == input_ids.shape[1]}
        return generator

    def _check_text_behind_images(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
        """Raise InputError where a prompt ends with an image, in front of which an assistant's cache would go back.

        It does where the model accepts none of its guesses: the prompt's last token is read again with the model's own.
        """
        images, mask = _given(model_kwargs), model_kwargs.get("attention_mask")
        if not images or not input_ids.shape[1]:
            return
        inputs = self._check(input_ids, None if mask is None else mask[:, -input_ids.shape[1] :], images)
        for points, order, real in zip(inputs.images.points, inputs.images.by_row, inputs.real, strict=True):
            length = 0 if self.config.is_cross_attention or not order else inputs.images.counts[order[-1]]
            if points and points[-1] + length >= int(real.sum()):
                raise InputError(
                    "the prompt ends with an image, and assistant_model takes back the prompt's last token where its "
                    "guesses are wrong, but earlier windows are gone; let text follow the image, leave assistant_model "
                    "out, or guess by prompt_lookup_num_tokens."
                )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        is_first_iteration=False,
        attention_mask=None,
        inputs_embeds=None,
        **kwargs,
    ):
        """Hook called by GenerationMixin: passes images with the prompt, once; of a grown conversation what is new.

        Rows that are padded on the right are padded on the left instead: the next token follows the last column.
        """
        cache, padding_ids = kwargs.get(CACHE_ARGUMENT), kwargs.pop(PADDING_IDS, set())
        is_whole = kwargs.pop(IS_WHOLE, False) or next_sequence_length is not None
        num_cached = cache.get_seq_length() if isinstance(cache, CasaCache) else 0
        # A model that guesses for another one is called anew for each guess, and never for the first time.
        is_first_iteration = is_first_iteration or (isinstance(cache, CasaCache) and not num_cached)
        if cache is not None and not is_first_iteration:
            kwargs = {name: value for name, value in kwargs.items() if name not in IMAGE_ARGUMENTS}
            attention_mask = None  # what `generate` appends is real
        elif num_cached and is_whole:
            # transformers would cut the columns that are new and pass all images: it handles neither rows nor images.
            input_ids, attention_mask, kwargs = self._new_part(cache, input_ids, attention_mask, padding_ids, kwargs)
            next_sequence_length = None
        elif inputs_embeds is not None:
            inputs_embeds, attention_mask = pad_left(inputs_embeds, _mask_of(inputs_embeds, attention_mask))
        elif attention_mask is not None and attention_mask.shape == input_ids.shape:
            input_ids, attention_mask = pad_left(input_ids, attention_mask)
        prepared = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            is_first_iteration=is_first_iteration,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return {name: value for name, value in prepared.items() if name not in NOT_OF_FORWARD}

    def _new_part(
        self,
        cache: CasaCache,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        padding_ids: set[int],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return the ids, mask and other arguments of what a cache has not read of a conversation."""
        images = _given(kwargs)
        inputs = self._check(input_ids, attention_mask, images)
        new = find_continuation(cache, input_ids, inputs, padding_ids)
        new.apply(cache)
        selected = self._images(select_images(images, inputs, new.images), new.points, input_ids.device)
        rest = {name: value for name, value in kwargs.items() if name not in IMAGE_ARGUMENTS}
        return new.input_ids, new.attention_mask, rest | selected

    def _check(
        self, input_ids: Tensor | None, mask: Tensor | None, arguments: dict[str, Any], cache: CasaCache | None = None
    ) -> CallInputs:
        """Check what `generate` was given, which may lie on the CPU: transformers moves it before each call."""
        embeddings = arguments.get(EMBEDDINGS)
        text = input_ids if embeddings is None else embeddings
        device = text.device if isinstance(text, Tensor) and text.device.type == "cpu" else self.device
        images = _given(arguments)
        return self.model.check_inputs(
            input_ids, cache, device, attention_mask=mask, inputs_embeds=embeddings, **images
        )

    def _images(self, content: dict[str, Tensor], points: list[list[int]], device: torch.device) -> dict[str, Tensor]:
        """Return a call's image arguments: with insertion points where the fusion takes them."""
        return add_insertion_points(content, points, device) if self.config.is_cross_attention else content


def _given(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Return the image arguments among these."""
    return {name: arguments[name] for name in IMAGE_ARGUMENTS if arguments.get(name) is not None}


def _mask_of(embeddings: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mask (B, T) of embeddings (B, T, C) that `generate` has checked; it drops one that is all ones."""
    return torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device) if mask is None else mask


def _padding_ids(generation_config: GenerationConfig) -> set[int]:
    """Return the ids that `generate` writes behind the end of a row: the padding token, or a stop token instead."""
    return {*list_token_ids(generation_config.pad_token_id), *list_token_ids(generation_config.eos_token_id)}
