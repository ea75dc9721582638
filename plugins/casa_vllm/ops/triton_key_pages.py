"""Triton kernels that normalise and rotate queries and keys, and write keys and values to their pages.

One for the text of a CA layer, one for image tokens of all CA layers. A program has one head of one token. Rotation
pairs each of the head's first R elements with the one R / 2 further on or back, which the program loads as well, so
that its lanes exchange nothing:

    element    0 .. R/2-1 | R/2 .. R-1 | R .. D-1        x cos - partner sin | x cos + partner sin | x
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl


@triton.jit
def _prepared_head(
    source, weight, dims, dim_mask, cos, sin, eps,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """The head at `source`, normalised and rotated in float32; a ROTARY_DIM of 0 does not rotate."""
    element = source.dtype.element_ty
    x = tl.load(source + dims, mask=dim_mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, 0) / HEAD_DIM + eps)
        # Rounded where vLLM's norm rounds: before and after the weight.
        x = (x * scale).to(element).to(tl.float32)
        x = (x * tl.load(weight + dims, mask=dim_mask, other=0.0).to(tl.float32)).to(element).to(tl.float32)
    if ROTARY_DIM > 0:
        HALF: tl.constexpr = ROTARY_DIM // 2
        is_first = dims < HALF
        partner = tl.where(is_first, dims + HALF, dims - HALF)
        partner_mask = dims < ROTARY_DIM
        y = tl.load(source + partner, mask=partner_mask, other=0.0).to(tl.float32)
        if HAS_NORM:
            y = (y * scale).to(element).to(tl.float32)
            y = (y * tl.load(weight + partner, mask=partner_mask, other=0.0).to(tl.float32)).to(element).to(tl.float32)
        x = x * cos + tl.where(is_first, -y, y) * sin
    return x


@triton.jit(do_not_specialize=("num_slots",), do_not_specialize_on_alignment=("positions_ptr", "slots_ptr"))
def _text_heads_kernel(
    query_ptr, key_ptr, value_ptr, prepared_ptr, cache_ptr, positions_ptr, slots_ptr, cos_sin_ptr,
    query_weight_ptr, key_weight_ptr, num_slots, eps,
    query_stride, key_stride, value_stride, prepared_stride, block_stride, head_stride, slot_stride,
    NUM_HEADS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    ROTARY_DIM: tl.constexpr, HAS_NORM: tl.constexpr, HAS_KEYS: tl.constexpr,
):  # fmt: skip
    """Programs (token, head): the query heads first, then the heads of keys and values."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, DIMS)
    dim_mask = dims < HEAD_DIM
    cos = tl.full([DIMS], 1.0, dtype=tl.float32)
    sin = tl.zeros([DIMS], dtype=tl.float32)
    if ROTARY_DIM > 0:
        HALF: tl.constexpr = ROTARY_DIM // 2
        table = cos_sin_ptr + tl.load(positions_ptr + token) * ROTARY_DIM + dims % HALF
        cos = tl.load(table, mask=dims < ROTARY_DIM, other=1.0).to(tl.float32)
        sin = tl.load(table + HALF, mask=dims < ROTARY_DIM, other=0.0).to(tl.float32)
    if head < NUM_HEADS:
        source = query_ptr + token * query_stride + head * HEAD_DIM
        query = _prepared_head(source, query_weight_ptr, dims, dim_mask, cos, sin, eps, HEAD_DIM, ROTARY_DIM, HAS_NORM)
        target = prepared_ptr + token * prepared_stride + head * HEAD_DIM + dims
        tl.store(target, query.to(prepared_ptr.dtype.element_ty), mask=dim_mask)
    elif HAS_KEYS:
        kv_head = head - NUM_HEADS
        slot = tl.load(slots_ptr + token, mask=token < num_slots, other=-1)
        if slot >= 0:
            source = key_ptr + token * key_stride + kv_head * HEAD_DIM
            key = _prepared_head(source, key_weight_ptr, dims, dim_mask, cos, sin, eps, HEAD_DIM, ROTARY_DIM, HAS_NORM)
            value = tl.load(value_ptr + token * value_stride + kv_head * HEAD_DIM + dims, mask=dim_mask)
            entry = (slot // BLOCK) * block_stride + kv_head.to(tl.int64) * head_stride + (slot % BLOCK) * slot_stride
            element = cache_ptr.dtype.element_ty
            tl.store(cache_ptr + entry + dims, key.to(element), mask=dim_mask)
            tl.store(cache_ptr + entry + HEAD_DIM + dims, value.to(element), mask=dim_mask)


@triton.jit(do_not_specialize=("layer_stride", "slots_stride"), do_not_specialize_on_alignment=("slots_ptr",))
def _image_heads_kernel(
    projected_ptr, caches_ptr, cache_ptr, slots_ptr, cos_ptr, sin_ptr, weight_ptr, eps,
    layer_stride, token_stride, slots_stride, block_stride, head_stride, slot_stride,
    NUM_HEADS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    HAS_ROPE: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Programs (token, head, layer). Each layer has a cache of its own, of which only the address is in memory."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    slot = tl.load(slots_ptr + layer * slots_stride + token)
    if slot >= 0:
        dims = tl.arange(0, DIMS)
        dim_mask = dims < HEAD_DIM
        cos = tl.full([DIMS], 1.0, dtype=tl.float32)
        sin = tl.zeros([DIMS], dtype=tl.float32)
        ROTARY_DIM: tl.constexpr = HEAD_DIM if HAS_ROPE else 0
        if HAS_ROPE:
            cos = tl.load(cos_ptr + token * HEAD_DIM + dims, mask=dim_mask, other=1.0)
            sin = tl.load(sin_ptr + token * HEAD_DIM + dims, mask=dim_mask, other=0.0)
        source = projected_ptr + layer * layer_stride + token * token_stride + head * HEAD_DIM
        weight = weight_ptr + layer * HEAD_DIM
        key = _prepared_head(source, weight, dims, dim_mask, cos, sin, eps, HEAD_DIM, ROTARY_DIM, HAS_NORM)
        value = tl.load(source + NUM_HEADS * HEAD_DIM + dims, mask=dim_mask)
        element = cache_ptr.dtype.element_ty
        # An address in memory says nothing of its alignment, without which each value would be a store of its own.
        cache = tl.multiple_of(tl.load(caches_ptr + layer).to(tl.pointer_type(element)), 16)
        entry = (slot // BLOCK) * block_stride + head.to(tl.int64) * head_stride + (slot % BLOCK) * slot_stride
        tl.store(cache + entry + dims, key.to(element), mask=dim_mask)
        tl.store(cache + entry + HEAD_DIM + dims, value.to(element), mask=dim_mask)


def prepare_text_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """Normalise and rotate queries and keys of text, and write keys and values to their cache slots.

    Args:
        query: (T, H, D), heads contiguous, as of `key` and `value`.
        key: (T, Hkv, D).
        value: (T, Hkv, D).
        cache: (num_blocks, Hkv, block_size, 2 * D).
        slots: (T or fewer,) int64, block * block_size + offset; negative ones and those left out write nothing.
        positions: (T or more,) int64, rows of `cos_sin`.
        cos_sin: (positions, R), cosines and sines of the R / 2 frequencies; R may be less than D.
        norms: Weights (D,) of the norms of queries and keys; None where heads are not normalised.
        eps: Of the norms.

    Returns:
        (T, H, D) queries, contiguous.

    Mutates:
        cache.
    """
    num_tokens, num_heads, head_dim = query.shape
    prepared = torch.empty_like(query, memory_format=torch.contiguous_format)
    _text_heads_kernel[(num_tokens, num_heads + key.shape[1])](
        query, key, value, prepared, cache, positions, slots, cos_sin, *(norms or (query, key)), len(slots), eps,
        query.stride(0), key.stride(0), value.stride(0), prepared.stride(0), *cache.stride()[:3],
        NUM_HEADS=num_heads, BLOCK=cache.shape[2], HEAD_DIM=head_dim, DIMS=triton.next_power_of_2(head_dim),
        ROTARY_DIM=cos_sin.shape[1], HAS_NORM=norms is not None, HAS_KEYS=True, num_warps=1,
    )  # fmt: skip
    return prepared


def normalize_heads(query: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return (T, H, D) queries, each head of them normalised; see `prepare_text_heads`."""
    num_tokens, num_heads, head_dim = query.shape
    normed = torch.empty_like(query, memory_format=torch.contiguous_format)
    # What belongs to keys and positions is not read.
    _text_heads_kernel[(num_tokens, num_heads)](
        query, query, query, normed, query, query, query, query, weight, weight, 0, eps,
        query.stride(0), 0, 0, normed.stride(0), 0, 0, 0,
        NUM_HEADS=num_heads, BLOCK=1, HEAD_DIM=head_dim, DIMS=triton.next_power_of_2(head_dim),
        ROTARY_DIM=0, HAS_NORM=True, HAS_KEYS=False, num_warps=1,
    )  # fmt: skip
    return normed


def write_image_heads(
    projected: torch.Tensor,
    caches: Sequence[torch.Tensor],
    addresses: torch.Tensor,
    slots: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    norms: torch.Tensor | None,
    eps: float,
) -> None:
    """Normalise and rotate keys of image tokens, and write keys and values of L layers to their cache slots.

    Args:
        projected: (L, N, 2 * Hkv * D), keys before values, contiguous.
        caches: The caches of the layers, (num_blocks, Hkv, block_size, 2 * D) each, all with the same strides.
        addresses: (L,) int64, where each cache begins.
        slots: (L, N) int64, tokens contiguous; negative ones write nothing.
        rope: float32 cosines and sines, (N, D) each, contiguous; None where rotation is the identity.
        norms: Weights (L, D) of the norms of keys; None where keys are not normalised.
        eps: Of the norms.

    Mutates:
        caches.
    """
    num_layers, num_tokens, _ = projected.shape
    cache = caches[0]
    num_kv_heads, head_dim = cache.shape[1], cache.shape[3] // 2
    cos, sin = (projected, projected) if rope is None else rope
    _image_heads_kernel[(num_tokens, num_kv_heads, num_layers)](
        projected, addresses, cache, slots, cos, sin, projected if norms is None else norms, eps,
        projected.stride(0), projected.stride(1), slots.stride(0), *cache.stride()[:3],
        NUM_HEADS=num_kv_heads, BLOCK=cache.shape[2], HEAD_DIM=head_dim, DIMS=triton.next_power_of_2(head_dim),
        HAS_ROPE=rope is not None, HAS_NORM=norms is not None, num_warps=1,
    )  # fmt: skip
