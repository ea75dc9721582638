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


@dataclass
class WindowText:
    """The text part of window attention (`ca_tv`).

    Attributes:
        block_table: (R, text pages) int32, one row per request; entries of pages that no
            segment reads may be anything.
        rows: (V,) int32, the row of `block_table` that a segment reads.
        starts: (V,) int32, first text position of the segment's window.
        first_positions: (V,) int32, text position of the segment's first query; the others
            follow one by one. Never less than `starts`.
        slot_mapping: (T or more,) int64, cache slot of each scheduled token; -1 writes nothing.
    """

    block_table: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor
    first_positions: torch.Tensor
    slot_mapping: torch.Tensor


@dataclass
class WindowAttentionMetadata:
    """What the queries of one step may see. Tensors live on the device of the caches.

    Attributes:
        num_actual_tokens: T, scheduled tokens; rows of query and output beyond are padding.
        max_query_len: longest segment in tokens; 1 selects the decode kernel.
        query_start_loc: (V + 1,) int32, cumulative. Padding segments at the end are empty.
        image_block_table: (V, P) int32, image pages of the segment's window in order.
        image_page_lens: (V, P) int32, valid tokens of each page. Every image starts a page, so
            a page in the middle may be partial (adjacent images).
        num_image_pages: (V,) int32, 0 for a segment without an image; the columns beyond are
            never read.
        has_images: False promises on the host that no segment has an image, so that `ca` may
            skip its work. True where it is not known (CUDA graphs).
        text: the text part for `ca_tv`, None for `ca`.
        torch_buckets: the torch implementation's plan, filled by the first layer of a step.
    """

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    image_block_table: torch.Tensor
    image_page_lens: torch.Tensor
    num_image_pages: torch.Tensor
    has_images: bool = True
    text: WindowText | None = None
    torch_buckets: list[Any] | None = field(default=None, repr=False)

    @property
    def num_segments(self) -> int:
        """V, padding segments included."""
        return self.query_start_loc.shape[0] - 1
