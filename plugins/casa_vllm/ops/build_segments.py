"""Builds the tensors of a step's segments from the rows' state; one kernel on a GPU, torch on a CPU.

row of a request in the state     START  FIRST_PAGE  NUM_PAGES  | 16 16 9 ...   valid tokens of the row's pages
row of a request in the table                                   |  7  4 5 ...   the row's pages
                                          |  FIRST_PAGE = 1, NUM_PAGES = 2
segment                            text start, first position   | 16  9, pages 4 5
"""

import torch

from casa_vllm.ops.segments import PAGE_LENS, SegmentTensors


def build_segments(
    out: SegmentTensors,
    state: torch.Tensor,
    rows: torch.Tensor,
    num_requests: int,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    splits: torch.Tensor | None,
    *,
    padded: tuple[torch.Tensor, int] | None = None,
    use_triton: bool,
) -> None:
    """Build the segments of a step.

    Args:
        out: Where to; its `query_start_loc` is read, unless `padded` is given.
        state: (rows, 3 + row pages) int32.
        rows: (R or more,) int64, the state's row of each request.
        num_requests: R. Segments of requests beyond have no image and a window that starts at 0.
        block_table: (R or more, row pages) int32, in batch order.
        positions: (T,) int64, text position of each token.
        splits: (V, 4) int32, see `casa_vllm.window_states.SegmentPlan`; None if segment v is request v.
        padded: Starts (S + 1 or more,) int32 of the step's S segments and S, where `out` has more of them and gets
            its starts from these: of the others the first has all further tokens, sees nothing, and the rest is empty.
            Triton's kernel alone; None: the segments of `out` are the step's.
        use_triton: Run the Triton kernel.

    Mutates:
        `out`.
    """
    if use_triton:
        from casa_vllm.ops.triton_build_segments import triton_build_segments

        triton_build_segments(out, state, rows, num_requests, block_table, positions, splits, padded)
    elif padded is not None:
        raise NotImplementedError("padded segments are of CUDA graphs; expected use_triton.")
    else:
        torch_build_segments(out, state, rows, num_requests, block_table, positions, splits)


def torch_build_segments(
    out: SegmentTensors,
    state: torch.Tensor,
    rows: torch.Tensor,
    num_requests: int,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    splits: torch.Tensor | None,
) -> None:
    """See `build_segments`; on CPUs, where every segment is of a request."""
    num_pages = out.pages.shape[1]
    if splits is None:
        requests = torch.arange(num_requests)
        state_rows = rows[:num_requests]
        starts, first_pages, counts = state[state_rows, :PAGE_LENS].unbind(1)
    else:
        requests, starts, first_pages, counts = splits.unbind(1)
        state_rows = rows[requests]
    begins = out.query_start_loc[:-1]
    torch.stack((positions[begins].int(), starts, counts, requests.int()), out=out.fields)
    # Columns beyond a segment's pages are never read, but have to exist.
    columns = (first_pages[:, None] + torch.arange(num_pages)).clamp_(max=block_table.shape[1] - 1)
    out.pages.copy_(block_table[requests[:, None], columns])
    columns.clamp_(max=state.shape[1] - PAGE_LENS - 1)
    out.page_lens.copy_(state[state_rows[:, None], PAGE_LENS + columns])
    if out.relative_positions is not None:
        lens = out.query_start_loc.diff()
        num_tokens = int(out.query_start_loc[-1])
        out.relative_positions[num_tokens:] = 0
        torch.sub(
            positions[:num_tokens],
            starts.repeat_interleave(lens, output_size=num_tokens),
            out=out.relative_positions[:num_tokens],
        )
