"""Window attention as Triton kernels.

One kernel serves prefill and decode. A program owns one tile of queries of one segment and one
kv head; its rows are (query, head of the group) pairs, so that grouped heads share every key:

    rows of a tile    query 0: head 0 .. G-1 | query 1: head 0 .. G-1 | ...
    keys of a tile    [ image pages of the window | text from the window's start to the tile's end ]

Prefill gives a tile as many queries as fit in ROWS. Decode has one query a segment, too few
programs to fill a GPU with when few requests run, so the keys are split: each of SPLITS programs
attends its share of the keys and a second kernel merges them by their log-sum-exp.

The grid depends on shapes alone and every length is read on the device, so a captured CUDA graph
stays right while the persistent metadata buffers behind it change.
"""

import torch
import triton
import triton.language as tl

from casa_vllm.ops.segments import WindowAttentionMetadata

MAX_SPLITS = 32
# Programs worth launching before splitting keys further gains nothing: about four for each
# multiprocessor of an H100/H200 (132). A constant, so that no device is queried per call.
TARGET_PROGRAMS = 528


@triton.jit
def _attend_keys(
    accumulator, row_max, row_sum, query, keys_ptr, offsets, key_mask, visible, dims, dim_mask,
    scale, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online-softmax step over one tile of keys; rows that see none of them are left alone."""
    load_mask = key_mask[:, None] & dim_mask[None, :]
    pointers = keys_ptr + offsets[:, None] + dims[None, :]
    key = tl.load(pointers, mask=load_mask, other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # exp2(-inf - -inf) is NaN: a row that has seen no key yet subtracts 0 instead.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    value = tl.load(pointers + HEAD_DIM, mask=load_mask, other=0.0)
    accumulator = accumulator * decay[:, None]
    accumulator += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    return accumulator, new_max, row_sum * decay + tl.sum(weights, 1)


# What differs from step to step: specialised on it, a kernel would be compiled anew inside a request. Strides of
# tables are of the batch's widest row, and rows of one tensor of fields start at any multiple of 4 bytes.
VARYING = ("num_segments", "num_rows", "image_table_stride", "page_lens_stride", "text_table_stride")
UNALIGNED = (
    "query_start_loc_ptr", "image_table_ptr", "page_lens_ptr", "num_pages_ptr",
    "text_table_ptr", "text_rows_ptr", "text_starts_ptr", "first_positions_ptr",
)  # fmt: skip


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _window_attention_kernel(
    query_ptr, image_ptr, text_ptr, output_ptr, beside_ptr, partial_ptr, max_ptr, sum_ptr,
    query_start_loc_ptr, image_table_ptr, page_lens_ptr, num_pages_ptr,
    text_table_ptr, text_rows_ptr, text_starts_ptr, first_positions_ptr,
    num_segments, num_rows, scale, num_heads,
    query_stride, output_stride, beside_stride, image_table_stride, page_lens_stride, text_table_stride,
    image_block_stride, image_head_stride, image_slot_stride,
    text_block_stride, text_head_stride, text_slot_stride,
    IMAGE_BLOCK: tl.constexpr, TEXT_BLOCK: tl.constexpr, HAS_TEXT: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, GROUP: tl.constexpr,
    TILE_QUERIES: tl.constexpr, ROWS: tl.constexpr, TILE_KEYS: tl.constexpr,
    SPLITS: tl.constexpr, IS_DECODE: tl.constexpr, PRECISION: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if IS_DECODE:
        segment = tl.program_id(0)
        tile = 0
        query_start = tl.load(query_start_loc_ptr + segment)
        query_len = tl.load(query_start_loc_ptr + segment + 1) - query_start
    else:
        # Segment s starts at tile start(s) // TILE_QUERIES + s: at most one tile a segment is
        # wasted and the host needs no list of tiles. Binary search for the last such s.
        program = tl.program_id(0)
        # A graph has far more segments than most of its steps: programs of the empty ones at the end search nothing.
        num_tokens = tl.load(query_start_loc_ptr + num_segments)
        behind = program - num_tokens // TILE_QUERIES
        is_behind = (behind >= 0) & (behind < num_segments)
        is_empty = tl.load(query_start_loc_ptr + behind, mask=is_behind, other=-1) == num_tokens
        low = tl.full([], 0, tl.int32)
        high = tl.where(is_empty, 1, num_segments)
        while high - low > 1:
            middle = (low + high) // 2
            if tl.load(query_start_loc_ptr + middle) // TILE_QUERIES + middle <= program:
                low = middle
            else:
                high = middle
        segment = low
        query_start = tl.load(query_start_loc_ptr + segment)
        query_len = tl.where(is_empty, 0, tl.load(query_start_loc_ptr + segment + 1) - query_start)
        tile = program - (query_start // TILE_QUERIES + segment)

    if tile * TILE_QUERIES < query_len:
        rows = tl.arange(0, ROWS)
        dims = tl.arange(0, DIMS)
        row_query = tile * TILE_QUERIES + rows // GROUP
        row_head = kv_head * GROUP + rows % GROUP
        row_mask = (rows < TILE_QUERIES * GROUP) & (row_query < query_len)
        dim_mask = dims < HEAD_DIM
        token = (query_start + row_query).to(tl.int64)
        mask = row_mask[:, None] & dim_mask[None, :]
        cells = row_head[:, None] * HEAD_DIM + dims[None, :]
        query = tl.load(query_ptr + token[:, None] * query_stride + cells, mask=mask, other=0.0)

        num_pages = tl.load(num_pages_ptr + segment)
        image_tiles = tl.cdiv(num_pages * IMAGE_BLOCK, TILE_KEYS)
        num_tiles = image_tiles
        if HAS_TEXT:
            text_start = tl.load(text_starts_ptr + segment)
            first_position = tl.load(first_positions_ptr + segment)
            last_query = tl.minimum((tile + 1) * TILE_QUERIES, query_len) - 1
            num_text = first_position + last_query - text_start + 1
            num_tiles += tl.cdiv(num_text, TILE_KEYS)
            text_row = tl.load(text_rows_ptr + segment).to(tl.int64) * text_table_stride
        share = tl.cdiv(num_tiles, SPLITS)
        begin = split * share
        end = tl.minimum(begin + share, num_tiles)

        accumulator = tl.zeros([ROWS, DIMS], dtype=tl.float32)
        row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([ROWS], dtype=tl.float32)
        key_lane = tl.arange(0, TILE_KEYS)
        log2_scale = scale * 1.4426950408889634

        for key_tile in range(begin, tl.minimum(end, image_tiles)):
            slot = key_tile * TILE_KEYS + key_lane
            page = slot // IMAGE_BLOCK
            in_table = page < num_pages
            entry = segment.to(tl.int64) * page_lens_stride + page
            page_len = tl.load(page_lens_ptr + entry, mask=in_table, other=0)
            key_mask = slot % IMAGE_BLOCK < page_len
            entry = segment.to(tl.int64) * image_table_stride + page
            block = tl.load(image_table_ptr + entry, mask=key_mask, other=0).to(tl.int64)
            offsets = block * image_block_stride + (slot % IMAGE_BLOCK) * image_slot_stride
            accumulator, row_max, row_sum = _attend_keys(
                accumulator, row_max, row_sum, query,
                image_ptr + kv_head.to(tl.int64) * image_head_stride, offsets, key_mask,
                key_mask[None, :] & row_mask[:, None], dims, dim_mask,
                log2_scale, HEAD_DIM, PRECISION,
            )  # fmt: skip

        if HAS_TEXT:
            for key_tile in range(tl.maximum(begin, image_tiles), end):
                key = (key_tile - image_tiles) * TILE_KEYS + key_lane
                key_mask = key < num_text
                position = text_start + key
                entry = text_row + position // TEXT_BLOCK
                block = tl.load(text_table_ptr + entry, mask=key_mask, other=0).to(tl.int64)
                offsets = block * text_block_stride + (position % TEXT_BLOCK) * text_slot_stride
                causal = position[None, :] <= (first_position + row_query)[:, None]
                accumulator, row_max, row_sum = _attend_keys(
                    accumulator, row_max, row_sum, query,
                    text_ptr + kv_head.to(tl.int64) * text_head_stride, offsets, key_mask,
                    causal & key_mask[None, :] & row_mask[:, None], dims, dim_mask,
                    log2_scale, HEAD_DIM, PRECISION,
                )  # fmt: skip

        if SPLITS == 1:
            # A row without any key has a sum of 0 and an accumulator of 0: it gets exactly 0.
            result = accumulator / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
            pointers = output_ptr + token[:, None] * output_stride + cells
            tl.store(pointers, result.to(output_ptr.dtype.element_ty), mask=mask)
            if BESIDE > 0:
                beside = tl.load(beside_ptr + token[:, None] * beside_stride + cells, mask=mask)
                tl.store(pointers - BESIDE, beside, mask=mask)
        else:
            index = (segment * num_heads + row_head).to(tl.int64) * SPLITS + split
            tl.store(max_ptr + index, row_max, mask=row_mask)
            tl.store(sum_ptr + index, row_sum, mask=row_mask)
            pointers = partial_ptr + index[:, None] * HEAD_DIM + dims[None, :]
            tl.store(pointers, accumulator, mask=mask)
    elif IS_DECODE and SPLITS == 1:
        if segment < num_rows:  # a padding segment: nobody else writes its row
            lanes = tl.arange(0, ROWS * DIMS)
            padding_row = output_ptr + segment.to(tl.int64) * output_stride + kv_head * GROUP * HEAD_DIM
            zeros = tl.zeros([ROWS * DIMS], dtype=output_ptr.dtype.element_ty)
            tl.store(padding_row + lanes, zeros, mask=lanes < GROUP * HEAD_DIM)
            if BESIDE > 0:
                tl.store(padding_row - BESIDE + lanes, zeros, mask=lanes < GROUP * HEAD_DIM)


@triton.jit(do_not_specialize=("num_rows",), do_not_specialize_on_alignment=("query_start_loc_ptr",))
def _merge_splits_kernel(
    partial_ptr, max_ptr, sum_ptr, output_ptr, beside_ptr, query_start_loc_ptr, num_rows, num_heads,
    output_stride, beside_stride,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, SPLITS: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """One program a (segment, head): the splits weighted by their share of the softmax."""
    segment = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(query_start_loc_ptr + segment).to(tl.int64)
    if tl.load(query_start_loc_ptr + segment + 1) > token:
        dims = tl.arange(0, DIMS)
        dim_mask = dims < HEAD_DIM
        index = (segment * num_heads + head).to(tl.int64) * SPLITS + tl.arange(0, SPLITS)
        maxima = tl.load(max_ptr + index)
        top = tl.max(maxima, 0)
        weights = tl.exp2(maxima - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(weights * tl.load(sum_ptr + index), 0)
        pointers = partial_ptr + index[:, None] * HEAD_DIM + dims[None, :]
        partial = tl.load(pointers, mask=dim_mask[None, :], other=0.0)
        result = tl.sum(partial * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
        pointers = output_ptr + token * output_stride + head * HEAD_DIM + dims
        tl.store(pointers, result.to(output_ptr.dtype.element_ty), mask=dim_mask)
        if BESIDE > 0:
            beside = tl.load(beside_ptr + token * beside_stride + head * HEAD_DIM + dims, mask=dim_mask)
            tl.store(pointers - BESIDE, beside, mask=dim_mask)
    elif segment < num_rows:  # a padding segment: nobody else writes its row
        dims = tl.arange(0, DIMS)
        pointers = output_ptr + segment.to(tl.int64) * output_stride + head * HEAD_DIM + dims
        zeros = tl.zeros([DIMS], dtype=output_ptr.dtype.element_ty)
        tl.store(pointers, zeros, mask=dims < HEAD_DIM)
        if BESIDE > 0:
            tl.store(pointers - BESIDE, zeros, mask=dims < HEAD_DIM)


@triton.jit
def _write_pages_kernel(
    key_ptr, value_ptr, cache_ptr, slots_ptr, key_stride, value_stride,
    block_stride, head_stride, slot_stride,
    BLOCK: tl.constexpr, CELLS: tl.constexpr, CELLS_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program a token: all its heads, keys and values."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        cells = tl.arange(0, CELLS_PADDED)
        mask = cells < CELLS
        target = cache_ptr + (slot // BLOCK) * block_stride + (slot % BLOCK) * slot_stride
        target += (cells // HEAD_DIM).to(tl.int64) * head_stride + cells % HEAD_DIM
        element = cache_ptr.dtype.element_ty
        key = tl.load(key_ptr + token * key_stride + cells, mask=mask)
        tl.store(target, key.to(element), mask=mask)
        value = tl.load(value_ptr + token * value_stride + cells, mask=mask)
        tl.store(target + HEAD_DIM, value.to(element), mask=mask)


def triton_window_attention(
    query: torch.Tensor,
    image_cache: torch.Tensor,
    text_cache: torch.Tensor | None,
    metadata: WindowAttentionMetadata,
    scale: float,
    output: torch.Tensor,
    beside: torch.Tensor | None = None,
) -> None:
    """See `casa_vllm.ops.window_attention`; `output` is the results' part, behind that of `beside`."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = image_cache.shape[1]
    group = num_heads // num_kv_heads
    num_segments, is_decode = metadata.num_segments, metadata.max_query_len == 1
    tiles = tile_constants(head_dim, group, query.dtype, is_decode=is_decode)
    if is_decode:
        num_tiles, splits = num_segments, decode_splits(num_segments * num_kv_heads)
    else:
        num_tiles, splits = metadata.num_tokens // tiles["TILE_QUERIES"] + num_segments, 1
    if num_tiles == 0:
        return
    partial = maxima = sums = query
    # How far before a result its neighbour stands.
    distance = 0 if beside is None else num_heads * head_dim
    beside = query if beside is None else beside
    if splits > 1:
        # Allocated per call: under capture it comes from the graph's own pool, at a fixed address.
        shape = (num_segments, num_heads, splits)
        partial = query.new_empty((*shape, head_dim), dtype=torch.float32)
        maxima, sums = query.new_empty((2, *shape), dtype=torch.float32)
    has_text = metadata.text_block_table is not None
    text_cache = text_cache if has_text else image_cache
    text_block_table = metadata.text_block_table if has_text else metadata.image_block_table
    _window_attention_kernel[(num_tiles, num_kv_heads, splits)](
        query, image_cache, text_cache, output, beside, partial, maxima, sums,
        metadata.query_start_loc,
        metadata.image_block_table,
        metadata.image_page_lens,
        metadata.num_image_pages,
        text_block_table,
        metadata.text_rows,
        metadata.text_starts,
        metadata.first_positions,
        num_segments, len(output), scale, num_heads,
        query.stride(0), output.stride(0), beside.stride(0),
        metadata.image_block_table.stride(0),
        metadata.image_page_lens.stride(0),
        text_block_table.stride(0),
        *image_cache.stride()[:3],
        *text_cache.stride()[:3],
        IMAGE_BLOCK=image_cache.shape[2], TEXT_BLOCK=text_cache.shape[2], HAS_TEXT=has_text,
        SPLITS=splits, BESIDE=distance, **tiles,
        num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _merge_splits_kernel[(num_segments, num_heads)](
            partial, maxima, sums, output, beside, metadata.query_start_loc, len(output), num_heads,
            output.stride(0), beside.stride(0),
            HEAD_DIM=head_dim, DIMS=tiles["DIMS"], SPLITS=splits, BESIDE=distance,
        )  # fmt: skip


def tile_constants(head_dim: int, group: int, dtype: torch.dtype, *, is_decode: bool) -> dict[str, int | bool | str]:
    """Constants of the attention kernel for heads of this size, `group` query heads to a kv head."""
    dims, rows = triton.next_power_of_2(head_dim), triton.next_power_of_2(group)
    rows = max(16, rows) if is_decode else max(64 if dims <= 128 else 32, rows)
    return {
        "HEAD_DIM": head_dim,
        "DIMS": dims,
        "GROUP": group,
        "ROWS": rows,
        "TILE_QUERIES": 1 if is_decode else rows // group,
        "TILE_KEYS": 64 if dims <= 64 and dtype.itemsize == 2 else 32,
        "IS_DECODE": is_decode,
        # TF32 would cost float32 models the parity that they are run for.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def decode_splits(num_programs: int) -> int:
    """How many ways to split the keys so that `num_programs` tiles fill a GPU; a power of two."""
    wanted = max(1, TARGET_PROGRAMS // max(1, num_programs))
    return min(MAX_SPLITS, 1 << (wanted.bit_length() - 1))


def triton_write_pages(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """See `casa_vllm.ops.write_pages`."""
    num_tokens = min(len(key), len(slots))
    if num_tokens == 0:
        return
    num_kv_heads, block_size, head_dim = cache.shape[1], cache.shape[2], cache.shape[3] // 2
    cells = num_kv_heads * head_dim
    _write_pages_kernel[(num_tokens,)](
        key, value, cache, slots, key.stride(0), value.stride(0), *cache.stride()[:3],
        BLOCK=block_size, CELLS=cells, CELLS_PADDED=triton.next_power_of_2(cells),
        HEAD_DIM=head_dim,
    )  # fmt: skip
