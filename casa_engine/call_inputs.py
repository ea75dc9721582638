"""The one check of a forward call's inputs, made before anything changes: eager and exported models share it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from casa_engine.configuration import CasaConfig
from casa_engine.errors import InputError
from casa_engine.image_inputs import VIRTUAL_TOKENS, ImageInputs, check_images
from casa_engine.tensor_checks import check_tensor

NO_ID = -1


@dataclass(frozen=True)
class CallInputs:
    """Checked inputs of one call of B rows of T columns.

    Attributes:
        ids: int64 (B, T). Of a call with embeddings: the image token's where an embedding is its, else `NO_ID`.
        real: bool (B, T). False for padding.
        positions: int64 (B, T). Text-stream index of each token, -1 for padding.
        num_seen: For each row its real tokens before this call.
        images: The new images.
    """

    ids: Tensor
    real: Tensor
    positions: Tensor
    num_seen: list[int]
    images: ImageInputs


def check_inputs(
    config: CasaConfig,
    device: torch.device,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    cached_positions: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    insertion_points: Tensor | None = None,
    image_embeds: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    image_token_embedding: Tensor | None = None,
) -> CallInputs:
    """Check the inputs of one call. Change nothing.

    Args:
        config: The model's configuration.
        device: Of the model.
        input_ids: int (B, T), both from 1.
        attention_mask: int or bool (B, T) or (B, S + T), 0 for padding.
        cached_positions: int64 (B, S). Text-stream index of each cached token, -1 for padding; None without a cache.
        pixel_values: See `check_images`, as the rest.
        image_grid_thw: The same.
        insertion_points: The same.
        image_embeds: The same.
        inputs_embeds: (B, T, C), floating. Instead of `input_ids`.
        image_token_embedding: (C,). With `inputs_embeds`: by it `insertion` finds the image tokens, as other models do.

    Returns:
        What the model needs to know of them.

    Raises:
        InputError: An input is not what the model takes.
    """
    text = input_ids if inputs_embeds is None else inputs_embeds
    if device.type == "meta" and isinstance(text, Tensor):  # weights that are offloaded; they go to the inputs
        device = text.device
    if inputs_embeds is None:
        _check_ids(config, input_ids, device)
        ids = input_ids.long()
    else:
        ids = _ids_of_embeddings(config, input_ids, inputs_embeds, image_token_embedding, device)
        _check_no_virtual_tokens(attention_mask, insertion_points)
    num_rows, num_columns = ids.shape
    cached = torch.zeros(num_rows, 0, dtype=torch.long, device=device) if cached_positions is None else cached_positions
    if len(cached) != num_rows:
        raise InputError(
            f"the cache has {len(cached)} conversations; got {num_rows} rows of ids. For several answers to each "
            "repeat the cache with batch_repeat_interleave."
        )
    real = _check_mask(attention_mask, ids, cached >= 0)
    num_seen = (cached >= 0).sum(dim=1)
    empty = ((real.sum(dim=1) + num_seen) == 0).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"rows {empty} have no text: attention_mask is 0 in all {num_columns} columns.")
    streams = [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]
    images = check_images(config, streams, pixel_values, image_embeds, image_grid_thw, insertion_points, device)
    positions = torch.where(real, real.long().cumsum(dim=1) - 1 + num_seen[:, None], -1)
    return CallInputs(ids, real, positions, num_seen.tolist(), images)


def pad_left(text: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Move each row's padding to its beginning, so that the last column is every row's last token.

    Args:
        text: Ids (B, T) or embeddings (B, T, C).
        attention_mask: int64 (B, T), 0 for padding.

    Returns:
        The same, in another order where a row had padding at its end. Insertion points stay right.
    """
    if attention_mask is None or attention_mask[:, -1].all():
        return text, attention_mask
    order = attention_mask.long().sort(dim=1, stable=True).indices
    rows = torch.arange(len(text), device=text.device)[:, None]
    return text[rows, order], attention_mask.gather(1, order)


def _check_ids(config: CasaConfig, ids: Tensor, device: torch.device) -> None:
    check_tensor("input_ids", ids, "int", ("B", "T"), device)
    if not ids.numel():
        raise InputError(f"input_ids has shape {tuple(ids.shape)}; expected at least one row and one token.")
    vocab_size = config.text_config.vocab_size
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"input_ids has {low if low < 0 else high}; expected ids from 0 to {vocab_size - 1}: use the checkpoint's "
            "own tokenizer."
        )


def _ids_of_embeddings(
    config: CasaConfig, ids: Tensor | None, embeddings: Tensor, image_token: Tensor | None, device: torch.device
) -> Tensor:
    """Return what stands for the ids of embeddings (B, T, C): int64 (B, T)."""
    if ids is not None:
        raise InputError("got both input_ids and inputs_embeds; they are the same text: pass one of them.")
    check_tensor("inputs_embeds", embeddings, "float", ("B", "T", config.text_config.hidden_size), device)
    if not embeddings.numel():
        raise InputError(f"inputs_embeds has shape {tuple(embeddings.shape)}; expected at least one row and one token.")
    if not torch.isfinite(embeddings).all():
        raise InputError("inputs_embeds has values that are NaN or infinite.")
    unknown = torch.full(embeddings.shape[:2], NO_ID, device=embeddings.device)
    if config.is_cross_attention:
        return unknown
    return unknown.masked_fill((embeddings == image_token.to(embeddings)).all(dim=-1), config.image_token_id)


def _check_no_virtual_tokens(mask: Tensor | None, insertion_points: Tensor | None) -> None:
    """Raise InputError where embeddings may have virtual tokens before the text, which no insertion point counts.

    PEFT puts them there without a word; only the mask, which it makes longer as floating point numbers, shows it.
    """
    if insertion_points is None:
        return
    if mask is None:
        raise InputError(
            "got inputs_embeds with insertion_points and no attention_mask; expected the mask (B, T) of the text that "
            f"the points were counted in, as CasaProcessor returns it: {VIRTUAL_TOKENS}, unnoticed without it."
        )
    if isinstance(mask, Tensor) and mask.is_floating_point():
        raise InputError(
            f"got inputs_embeds with insertion_points and attention_mask of {mask.dtype}, which PEFT makes of it; "
            f"expected whole numbers or bool: {VIRTUAL_TOKENS}. Use LoRA."
        )


def _check_mask(mask: Tensor | None, ids: Tensor, cached: Tensor) -> Tensor:
    """Return which columns of this call are real, bool (B, T)."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    check_tensor("attention_mask", mask, "mask", (len(ids), "T"), ids.device)
    num_columns, num_cached = ids.shape[1], cached.shape[1]
    if mask.shape[1] not in (num_columns, num_cached + num_columns):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; expected ({len(ids)}, {num_columns}), or "
            f"({len(ids)}, {num_cached + num_columns}) with the cached tokens."
        )
    if ((mask != 0) & (mask != 1)).any():
        raise InputError("attention_mask has other values than 0 (padding) and 1.")
    mask = mask.bool()
    if mask.shape[1] > num_columns and not torch.equal(mask[:, :num_cached], cached):
        raise InputError("attention_mask hides other cached tokens than the earlier calls did; expected the same.")
    return mask[:, -num_columns:]
