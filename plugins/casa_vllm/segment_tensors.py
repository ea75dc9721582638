"""The segments of one step as tensors on the device, for both model runners."""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from casa_vllm.cross_attention import CasaAttentionMetadata
from casa_vllm.ops import WindowAttentionMetadata
from casa_vllm.segment_planner import SegmentPlan


@dataclass
class SegmentTensors:
    """A plan's arrays on the device; V segments, T tokens, P pages of the widest segment.

    Attributes:
        fields: (5, V) int32: rows, first positions, text starts, numbers of pages, first pages.
        page_lens: (V, P) int32.
        relative_positions: (T or more,) int64; 0 for padding.
    """

    fields: torch.Tensor
    page_lens: torch.Tensor
    relative_positions: torch.Tensor

    @classmethod
    def zeros(cls, num_segments: int, num_pages: int, device: torch.device) -> "SegmentTensors":
        """Segments of one token, without an image, in a window that starts at 0."""
        return cls(
            torch.zeros(5, num_segments, dtype=torch.int32, device=device),
            torch.zeros(num_segments, num_pages, dtype=torch.int32, device=device),
            torch.zeros(num_segments, dtype=torch.int64, device=device),
        )

    @classmethod
    def from_plan(cls, plan: SegmentPlan, num_tokens: int, device: torch.device) -> "SegmentTensors":
        """Copies without waiting for the device.

        Args:
            plan: Segments of T tokens.
            num_tokens: T, or more where the batch is padded for a piecewise graph.
            device: Where to.
        """
        positions = np.zeros(num_tokens, dtype=np.int64)
        positions[: len(plan.relative_positions)] = plan.relative_positions
        fields = (
            plan.rows,
            plan.first_positions,
            plan.text_starts,
            plan.num_pages,
            plan.first_pages,
        )
        return cls(
            async_tensor_h2d(np.stack(fields).astype(np.int32), device=device),
            async_tensor_h2d(plan.page_lens, device=device),
            async_tensor_h2d(positions, device=device),
        )

    def first(self, num_segments: int) -> "SegmentTensors":
        """The first V segments of V tokens, as views."""
        return SegmentTensors(
            self.fields[:, :num_segments],
            self.page_lens[:num_segments],
            self.relative_positions[:num_segments],
        )

    def overwrite(self, step: "SegmentTensors | None") -> None:
        """Puts a step's segments in front and empties the rest. Mutates the buffers."""
        for buffer in (self.fields, self.page_lens, self.relative_positions):
            buffer.zero_()
        if step is not None:
            num_segments, num_pages = step.page_lens.shape
            self.fields[:, :num_segments].copy_(step.fields)
            self.page_lens[:num_segments, :num_pages].copy_(step.page_lens)
            self.relative_positions[:num_segments].copy_(step.relative_positions)

    def image_blocks(self, block_table: torch.Tensor) -> torch.Tensor:
        """(V, P) int32: each segment's pages, from its request's row of (R, row width) pages."""
        rows, first_pages = self.fields[0].long(), self.fields[4].long()
        columns = torch.arange(self.page_lens.shape[1], device=block_table.device)
        # Columns beyond a segment's pages are undefined and never read.
        columns = (first_pages[:, None] + columns).clamp_(max=block_table.shape[1] - 1)
        return block_table[rows[:, None], columns]

    def attention_metadata(
        self,
        query_start_loc: torch.Tensor,
        image_blocks: torch.Tensor,
        text: CommonAttentionMetadata | None,
        *,
        max_query_len: int,
        max_text_len: int,
        has_image: bool,
        num_tokens: int,
    ) -> CasaAttentionMetadata:
        """What CA layers read, over these very tensors.

        Args:
            query_start_loc: (V + 1,) int32.
            image_blocks: What `image_blocks` returned.
            text: Of the layers' text group; None for `ca`.
            max_query_len: See `WindowAttentionMetadata`, as the rest.
            max_text_len: The same; not used for `ca`.
            has_image: The same.
            num_tokens: The same.
        """
        rows, first_positions, text_starts, num_pages, _ = self.fields
        windows = WindowAttentionMetadata(
            query_start_loc=query_start_loc,
            first_positions=first_positions,
            image_block_table=image_blocks,
            image_page_lens=self.page_lens,
            num_image_pages=num_pages,
            text_starts=text_starts,
            text_rows=rows,
            text_block_table=None if text is None else text.block_table_tensor,
            text_slot_mapping=None if text is None else text.slot_mapping,
            max_query_len=max_query_len,
            max_text_len=0 if text is None else max_text_len,
            has_image=has_image,
            num_tokens=num_tokens,
        )
        return CasaAttentionMetadata(windows, None if text is None else self.relative_positions)
