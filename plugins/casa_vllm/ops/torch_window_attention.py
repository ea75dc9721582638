"""Window attention in plain PyTorch: the CPU path, and what the Triton kernels are tested against.

Segments are handled in buckets of similar query length (1, 2, 3-4, 5-8, ...): each bucket is one
padded, batched attention call, so a batch of decodes costs one call however many requests it has,
and padding at most doubles the work of a mixed batch. Which pages a bucket gathers and who sees
what is the same in every layer: it is worked out by the first and kept with the metadata.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from casa_vllm.ops.segments import WindowAttentionMetadata


@dataclass
class SegmentBucket:
    """B segments of similar query length, padded to Q queries and N keys.

    Attributes:
        tokens: (B, Q) int64, token of each query; a padding query repeats the segment's last.
        is_query: (B, Q) bool, False for padding queries; None where there are none.
        image_pages, text_pages: (B, Hkv, pages) int64, index of (block, head) in the flattened
            cache; None where no segment has one.
        unreadable: two (K,) int64, segment and key of what no query of the segment sees.
        bias: (B, 1, Q, N), 0 where a query sees a key, else the dtype's minimum.
        has_key: (B, Q, 1, 1) bool; None where every query has one.
    """

    tokens: torch.Tensor
    is_query: torch.Tensor | None
    image_pages: torch.Tensor | None
    text_pages: torch.Tensor | None
    unreadable: tuple[torch.Tensor, ...]
    bias: torch.Tensor
    has_key: torch.Tensor | None


def torch_window_attention(
    query: torch.Tensor,
    image_cache: torch.Tensor,
    text_cache: torch.Tensor | None,
    metadata: WindowAttentionMetadata,
    scale: float,
    output: torch.Tensor,
) -> None:
    """See `casa_vllm.ops.window_attention`."""
    if metadata.torch_buckets is None:
        metadata.torch_buckets = plan_buckets(metadata, image_cache, text_cache, query.dtype)
    output[: metadata.num_tokens] = 0
    for bucket in metadata.torch_buckets:
        cached = [
            _gather(cache, pages)
            for cache, pages in ((image_cache, bucket.image_pages), (text_cache, bucket.text_pages))
            if pages is not None
        ]
        cached = cached[0] if len(cached) == 1 else torch.cat(cached, 2)
        # An unused slot may hold NaN, and a softmax weight of 0 does not stop a NaN.
        cached[bucket.unreadable[0], :, bucket.unreadable[1]] = 0
        keys, values = cached.chunk(2, -1)
        attended = _attend(query[bucket.tokens], keys, values, bucket.bias, scale)
        if bucket.has_key is not None:
            attended = attended * bucket.has_key
        tokens = bucket.tokens
        if bucket.is_query is not None:
            tokens, attended = tokens[bucket.is_query], attended[bucket.is_query]
        output[tokens] = attended.to(output.dtype)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """Grouped-query attention of (B, Q, H, D) over (B, Hkv, N, D) -> (B, Q, H, D)."""
    if query.shape[1] == 1:
        # One query: the heads of a group become its rows, and read their keys once.
        grouped = query.unflatten(2, (keys.shape[1], -1))[:, 0]
        attended = scaled_dot_product_attention(
            grouped, keys, values, attn_mask=bias.expand(-1, -1, grouped.shape[2], -1), scale=scale
        )
        return attended.flatten(1, 2)[:, None]
    return scaled_dot_product_attention(
        query.transpose(1, 2),
        keys,
        values,
        attn_mask=bias,
        scale=scale,
        enable_gqa=query.shape[2] != keys.shape[1],
    ).transpose(1, 2)


def plan_buckets(
    metadata: WindowAttentionMetadata,
    image_cache: torch.Tensor,
    text_cache: torch.Tensor | None,
    dtype: torch.dtype,
) -> list[SegmentBucket]:
    """Group the segments that have a key to read; the others are left out."""
    starts = metadata.query_start_loc[:-1].long()
    lengths = metadata.query_start_loc[1:].long() - starts
    if metadata.text_block_table is None:
        lengths = lengths * (metadata.num_image_pages > 0)
    sizes = torch.ceil(torch.log2(lengths.clamp(min=1).double())).long()
    sizes.masked_fill_(lengths == 0, -1)
    buckets = []
    for size in sizes.unique().tolist():
        if size < 0:
            continue
        segments = (sizes == size).nonzero()[:, 0]
        last = lengths[segments, None] - 1
        offsets = torch.arange(int(last.max()) + 1, device=starts.device)
        is_query, offsets = offsets <= last, torch.minimum(offsets, last)

        image_blocks, image_visible = _image_keys(metadata, segments, image_cache.shape[2])
        visible = image_visible[:, None].expand(-1, offsets.shape[1], -1)
        text_blocks = None
        if metadata.text_block_table is not None:
            text_blocks, text_visible = _text_keys(metadata, segments, offsets, text_cache.shape[2])
            visible = torch.cat((visible, text_visible), 2)
        # Finite instead of -inf, so that a row without any key stays finite and can be zeroed.
        bias = torch.zeros(visible.shape, dtype=dtype, device=starts.device)
        bias.masked_fill_(~visible, torch.finfo(dtype).min)
        has_key = visible.any(2)
        buckets.append(
            SegmentBucket(
                tokens=starts[segments, None] + offsets,
                is_query=None if is_query.all() else is_query,
                image_pages=_pages(image_cache, image_blocks),
                text_pages=None if text_blocks is None else _pages(text_cache, text_blocks),
                unreadable=(~visible.any(1)).nonzero(as_tuple=True),
                bias=bias.unsqueeze(1),
                has_key=None if has_key.all() else has_key[..., None, None],
            )
        )
    return buckets


def torch_write_pages(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """See `casa_vllm.ops.write_pages`."""
    count = min(len(key), len(slots))
    slots, entries = slots[:count], torch.cat((key[:count], value[:count]), -1)
    written = slots >= 0
    if not written.all():
        slots, entries = slots[written], entries[written]
    cache[slots // cache.shape[2], :, slots % cache.shape[2]] = entries.to(cache.dtype)


def _image_keys(
    metadata: WindowAttentionMetadata, segments: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image pages (B, P) of the segments, and which of their slots hold a key, (B, P * BS)."""
    num_pages = metadata.num_image_pages[segments]
    pages = torch.arange(int(num_pages.max()), device=num_pages.device)
    blocks = metadata.image_block_table[segments, : len(pages)].long()
    lens = metadata.image_page_lens[segments, : len(pages)]
    lens = lens.masked_fill(pages >= num_pages[:, None], 0)
    valid = torch.arange(block_size, device=num_pages.device) < lens[..., None]
    return blocks.masked_fill(lens == 0, 0), valid.flatten(1)


def _text_keys(
    metadata: WindowAttentionMetadata,
    segments: torch.Tensor,
    offsets: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text pages (B, P) from the window's first to the last query's, and who sees which slot.

    Returns:
        Blocks (B, P) int64 and visibility (B, Q, P * block_size) bool.
    """
    starts = metadata.text_starts[segments].long()
    positions = metadata.first_positions[segments].long()[:, None] + offsets
    first_page = starts // block_size
    last_page = positions[:, -1] // block_size
    pages = first_page[:, None] + torch.arange(int((last_page - first_page).max()) + 1, device=starts.device)
    # Shorter windows of the bucket repeat their last page; nothing of the repetition is visible.
    rows = metadata.text_rows[segments].long()[:, None]
    blocks = metadata.text_block_table[rows, torch.minimum(pages, last_page[:, None])].long()
    slots = torch.arange(block_size, device=starts.device)
    keys = (pages[..., None] * block_size + slots).flatten(1)[:, None]
    return blocks, (keys >= starts[:, None, None]) & (keys <= positions[..., None])


def _pages(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor | None:
    """(B, Hkv, P) index of each (block, head) of `blocks` (B, P); None without any."""
    if blocks.shape[1] == 0:
        return None
    heads = torch.arange(cache.shape[1], device=blocks.device)
    return blocks[:, None] * cache.shape[1] + heads[:, None]


def _gather(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Copy keys and values (B, Hkv, P * block_size, 2 * D) of `pages` (B, Hkv, P)."""
    num_heads = cache.shape[1]
    if cache.is_contiguous():  # whole pages of a head, a plain memory copy each
        copied = cache.flatten(0, 1).index_select(0, pages.flatten()).view(*pages.shape, *cache.shape[2:])
    else:
        copied = cache[pages // num_heads, pages % num_heads]
    return copied.flatten(2, 3)
