"""Segments: the virtual sequences over which window attention runs.

A scheduled request may cross several windows in one step. Each (request, window) pair with
scheduled tokens is one segment, and every query of a segment has the same image keys:

    request A, scheduled t1..t6      request B, decoding
    t1 | t2 t3 t4 | t5 t6            t9
    v0   v1          v2              v3        query_start_loc = [0, 1, 4, 6, 7]
    -    image 1     image 2         image 7

`ca` sees the image keys only. `ca_tv` sees, besides, the text keys from the window's start up
to the query itself, through the request's ordinary text block table.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

# Columns of a request's row of state: its current window, then the valid tokens of each page of its row of pages.
START, FIRST_PAGE, NUM_PAGES, PAGE_LENS = 0, 1, 2, 3


@dataclass
class WindowAttentionMetadata:
    """The keys that the queries of one step see. Tensors are on the device of the caches.

    The same object serves all layers of a step. V segments (padding segments at the end are
    empty), T tokens, P image pages of the widest segment, R requests.

    Attributes:
        query_start_loc: (V + 1,) int32, cumulative: segments partition the tokens, in order.
        first_positions: (V,) int32, text position of the segment's first query; the others
            follow one by one. Never less than `text_starts`.
        image_block_table: (V, P) int32, image pages of the segment's window, in order.
        image_page_lens: (V, P) int32, valid tokens of each page. Every image starts a page, so
            any page may be partial (adjacent images), or hold nothing at all.
        num_image_pages: (V,) int32, 0 for a segment without an image; the columns beyond are
            never read.
        text_starts: (V,) int32, first text position of the segment's window.
        text_rows: (V,) int32, the row of `text_block_table` that the segment reads.
        text_block_table: (R, text pages) int32, None for `ca`; entries of pages that no segment
            reads may be anything.
        text_slot_mapping: (T or more,) int64, where each token's own text key goes, -1 for
            padding; None for `ca`.
        max_query_len: longest segment in tokens; 1 selects the decode kernel, for which segment v
            is token v: only padding segments, at the end, are empty, and their rows become 0.
        max_text_len: bound on the number of text keys of a query; 0 for `ca`.
        has_image: False promises that no segment has an image, so that `ca` may skip its work.
            True where the host does not know (CUDA graphs).
        num_tokens: T; rows of query and output beyond are padding.
        torch_buckets: the torch implementation's plan, filled by the first layer of a step.
    """

    query_start_loc: torch.Tensor
    first_positions: torch.Tensor
    image_block_table: torch.Tensor
    image_page_lens: torch.Tensor
    num_image_pages: torch.Tensor
    text_starts: torch.Tensor
    text_rows: torch.Tensor
    text_block_table: torch.Tensor | None
    text_slot_mapping: torch.Tensor | None
    max_query_len: int
    max_text_len: int
    has_image: bool
    num_tokens: int
    torch_buckets: list[Any] | None = field(default=None, repr=False)

    @property
    def num_segments(self) -> int:
        """V, padding segments included."""
        return self.query_start_loc.shape[0] - 1

    def tokens_with_image(self, num_tokens: int) -> torch.Tensor:
        """Return (num_tokens,) bool, whether each token's window has an image; of padding rows anything."""
        if self.max_query_len == 1 and self.num_segments == num_tokens:
            return self.num_image_pages > 0
        tokens = torch.arange(num_tokens, dtype=torch.int32, device=self.query_start_loc.device)
        segments = torch.searchsorted(self.query_start_loc[1:], tokens, right=True)
        return self.num_image_pages[segments.clamp(max=self.num_segments - 1)] > 0


@dataclass(frozen=True)
class SegmentTensors:
    """Segments as tensors on the device; V segments, T tokens or more, P pages of the widest segment.

    Attributes:
        query_start_loc: (V + 1,) int32.
        fields: (4, V) int32: first positions, text starts, numbers of pages, requests.
        page_lens: (V, P) int32; columns beyond a segment's pages are undefined.
        pages: (V, P) int32, the same.
        relative_positions: (T,) int64, each token's position counted from its window's start, 0 for padding; None for
            `ca`.
    """

    query_start_loc: torch.Tensor
    fields: torch.Tensor
    page_lens: torch.Tensor
    pages: torch.Tensor
    relative_positions: torch.Tensor | None

    @classmethod
    def empty(cls, query_start_loc: torch.Tensor, num_pages: int, num_tokens: int | None) -> "SegmentTensors":
        """Return tensors that nothing is in, for the segments of `query_start_loc`.

        Args:
            query_start_loc: (V + 1,) int32.
            num_pages: P.
            num_tokens: T; None for `ca`.
        """
        num_segments = len(query_start_loc) - 1
        positions = None
        if num_tokens is not None:
            positions = query_start_loc.new_empty(num_tokens, dtype=torch.int64)
        return cls(
            query_start_loc,
            query_start_loc.new_empty(4, num_segments),
            query_start_loc.new_empty(num_segments, num_pages),
            query_start_loc.new_empty(num_segments, num_pages),
            positions,
        )

    def first(self, query_start_loc: torch.Tensor) -> "SegmentTensors":
        """Return the first V segments of V tokens, as views, with other `query_start_loc` (V + 1,)."""
        num_segments = len(query_start_loc) - 1
        positions = self.relative_positions
        return SegmentTensors(
            query_start_loc,
            self.fields[:, :num_segments],
            self.page_lens[:num_segments],
            self.pages[:num_segments],
            None if positions is None else positions[:num_segments],
        )
