"""The segments of a step as one Triton kernel: one program a segment, which copies its pages and counts its tokens.

Of the host's values only the number of segments shapes it: it is the same launch whatever the step does.
"""

import torch
import triton
import triton.language as tl

from casa_vllm.ops import segments
from casa_vllm.ops.segments import SegmentTensors

BLOCK = 128
# Columns of a row of state, as a kernel may read them.
START, FIRST_PAGE, NUM_PAGES, PAGE_LENS = map(
    tl.constexpr, (segments.START, segments.FIRST_PAGE, segments.NUM_PAGES, segments.PAGE_LENS)
)
# What differs from step to step, or from the warm-up: specialised on it, the kernel would be compiled anew inside a
# request.
VARYING = (
    "num_requests", "num_segments", "num_positions", "state_stride", "table_stride", "fields_stride", "pages_stride",
)  # fmt: skip
UNALIGNED = (
    "query_start_loc_ptr", "splits_ptr", "fields_ptr", "page_lens_ptr", "pages_ptr", "relative_ptr",
    "padded_starts_ptr",
)  # fmt: skip


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _build_segments_kernel(
    state_ptr, rows_ptr, splits_ptr, query_start_loc_ptr, positions_ptr, table_ptr,
    fields_ptr, page_lens_ptr, pages_ptr, relative_ptr, padded_starts_ptr,
    num_requests, num_segments, num_positions, state_stride, table_stride, fields_stride, pages_stride,
    IS_SPLIT: tl.constexpr, HAS_TEXT: tl.constexpr, IS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    is_segment = segment < num_segments
    begin = tl.load(query_start_loc_ptr + tl.minimum(segment, num_segments))
    end = tl.load(query_start_loc_ptr + tl.minimum(segment + 1, num_segments))
    if IS_PADDED:
        begin = tl.where(segment <= num_segments, begin, num_positions)
        end = tl.where(is_segment, end, num_positions)
        tl.store(padded_starts_ptr + segment, begin)
        tl.store(padded_starts_ptr + segment + 1, end, mask=segment == tl.num_programs(0) - 1)
    request = tl.load(splits_ptr + 4 * segment, mask=is_segment, other=0) if IS_SPLIT else segment
    is_request = is_segment & (request < num_requests)
    row = tl.load(rows_ptr + request, mask=is_request, other=0)
    row_ptr = state_ptr + row * state_stride
    window_ptr = splits_ptr + 4 * segment + 1 if IS_SPLIT else row_ptr
    start = tl.load(window_ptr + START, mask=is_request, other=0)
    first_page = tl.load(window_ptr + FIRST_PAGE, mask=is_request, other=0)
    num_pages = tl.load(window_ptr + NUM_PAGES, mask=is_request, other=0)
    first_position = tl.load(positions_ptr + begin, mask=is_segment & (begin < end), other=0).to(tl.int32)
    if IS_PADDED:
        # Tokens at 0 of a window that starts behind them have no text, nor a row of a table.
        start = tl.where(is_segment, start, end - begin)
        request = tl.where(is_segment, request, 0)
    tl.store(fields_ptr + segment, first_position)
    tl.store(fields_ptr + fields_stride + segment, start)
    tl.store(fields_ptr + 2 * fields_stride + segment, num_pages)
    tl.store(fields_ptr + 3 * fields_stride + segment, request)
    block = tl.arange(0, BLOCK)
    for page in range(0, num_pages, BLOCK):
        mask = page + block < num_pages
        source = first_page + page + block
        target = segment * pages_stride + page + block
        tl.store(page_lens_ptr + target, tl.load(row_ptr + PAGE_LENS + source, mask=mask), mask=mask)
        tl.store(pages_ptr + target, tl.load(table_ptr + request * table_stride + source, mask=mask), mask=mask)
    if HAS_TEXT:
        for token in range(begin, end, BLOCK):
            mask = token + block < end
            position = tl.load(positions_ptr + token + block, mask=mask, other=0)
            tl.store(relative_ptr + token + block, tl.where(is_segment, position - start, 0), mask=mask)
        if segment == tl.num_programs(0) - 1:
            for token in range(end, num_positions, BLOCK):
                tl.store(relative_ptr + token + block, 0, mask=token + block < num_positions)


def triton_build_segments(
    out: SegmentTensors,
    state: torch.Tensor,
    rows: torch.Tensor,
    num_requests: int,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    splits: torch.Tensor | None,
    padded: tuple[torch.Tensor, int] | None = None,
) -> None:
    """See `casa_vllm.ops.build_segments.build_segments`."""
    relative, num_programs = out.relative_positions, len(out.query_start_loc) - 1
    starts, num_segments = (out.query_start_loc, num_programs) if padded is None else padded
    _build_segments_kernel[(num_programs,)](
        state, rows, state if splits is None else splits, starts, positions, block_table,
        out.fields, out.page_lens, out.pages, positions if relative is None else relative, out.query_start_loc,
        num_requests, num_segments, len(positions if relative is None else relative),
        state.stride(0), block_table.stride(0), out.fields.stride(0), out.pages.stride(0),
        IS_SPLIT=splits is not None, HAS_TEXT=relative is not None, IS_PADDED=padded is not None, BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
