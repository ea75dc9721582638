"""Plans the segments of one step for window attention, from its scheduled tokens.

Independent of the runner: V1 and V2 both pass the rows that were sent and the tokens that are
scheduled. The window rule itself is `casa_engine.windows`; a step's requests are concatenated to one
long text stream, with an image of no tokens at the start of each, so that one call plans them all:

    request A: t7 t8, image at 8        request B: t3, image at 2
    stream     A7 A8 ..................  B3
    images     A0(empty) A8 ............ B0(empty) B2
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from casa_engine.windows import plan_windows
from casa_vllm.request_images import RequestImages

# Distance between two requests on the long stream; beyond any text position.
STRIDE = 1 << 40


@dataclass(frozen=True)
class ImageRowLayout:
    """Positions of the images of one request in its row of pages; entry 0 is the empty image.

    Attributes:
        points: (1 + M,) int64 insertion points.
        page_begins, page_ends: (1 + M,) int64, pages of each image in the row. Images that no
            token could see when the row was sent have none.
        page_lens: (pages,) int32, valid tokens of each page of the row.
    """

    points: np.ndarray
    page_begins: np.ndarray
    page_ends: np.ndarray
    page_lens: np.ndarray

    @classmethod
    def of(cls, images: RequestImages, num_computed_tokens: int, block_size: int) -> "ImageRowLayout":
        """Returns the layout of a row that is sent when `num_computed_tokens` tokens are computed."""
        num_pages = images.num_pages(block_size)
        first = images.first_live(num_computed_tokens)
        num_pages[:first] = 0
        ends = np.concatenate(([0], np.cumsum(num_pages)))
        page_lens = np.full(ends[-1], block_size, dtype=np.int32)
        last_pages = ends[1:][first:] - 1
        page_lens[last_pages] = images.num_tokens[first:] - (num_pages[first:] - 1) * block_size
        begins = np.concatenate(([0], ends[:-1]))
        return cls(np.concatenate(([0], images.points)), begins, ends, page_lens)


@dataclass(frozen=True)
class SegmentPlan:
    """Segments of one step, as NumPy arrays; see `casa_vllm.ops.segments` for their meaning.

    Attributes:
        query_start_loc: (V + 1,) int32.
        rows: (V,) int32, request of each segment, in batch order.
        first_positions, text_starts: (V,) int32.
        first_pages, num_pages: (V,) int64, the segment's pages in its request's row.
        page_lens: (V, P) int32.
        relative_positions: (T,) int64, each token's position counted from its window's start.
        max_query_len, max_text_len: of the longest segment.
    """

    query_start_loc: np.ndarray
    rows: np.ndarray
    first_positions: np.ndarray
    text_starts: np.ndarray
    first_pages: np.ndarray
    num_pages: np.ndarray
    page_lens: np.ndarray
    relative_positions: np.ndarray
    max_query_len: int
    max_text_len: int

    @property
    def has_image(self) -> bool:
        """Whether any segment has image keys."""
        return bool(self.num_pages.any())

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.relative_positions)


class WindowTable:
    """The images of all requests of the worker."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._rows: dict[str, ImageRowLayout] = {}
        self._batch: tuple[list[str], tuple[np.ndarray, ...]] | None = None

    def add_row(self, request_id: str, features: Sequence[Any], num_computed_tokens: int) -> None:
        """Adds the row that was sent for a new or resumed request, or for a session's next chunk."""
        images = RequestImages.from_features(features)
        self._rows[request_id] = ImageRowLayout.of(images, num_computed_tokens, self.block_size)
        self._batch = None

    def remove(self, request_id: str) -> None:
        """Removes a request."""
        self._rows.pop(request_id, None)
        self._batch = None

    def has_images(self, request_ids: list[str]) -> bool:
        """Returns whether any of the requests has an image in its row, now or later."""
        return any(len(self._rows[request_id].page_lens) for request_id in request_ids)

    def pages_of(self, request_id: str, image: int) -> slice:
        """Returns the image's pages in the request's row."""
        row = self._rows[request_id]
        return slice(int(row.page_begins[image + 1]), int(row.page_ends[image + 1]))

    def plan(self, request_ids: list[str], num_computed: np.ndarray, num_scheduled: np.ndarray) -> SegmentPlan:
        """Plans one step.

        Args:
            request_ids: The R scheduled requests in batch order.
            num_computed: (R,) int, text tokens computed before the step.
            num_scheduled: (R,) int, text tokens of the step, at least 1 each.
        """
        points, begins, ends, lens, lens_offsets = self._concatenated(request_ids)
        num_scheduled = num_scheduled.astype(np.int64)
        rows = np.repeat(np.arange(len(request_ids)), num_scheduled)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(num_scheduled) - num_scheduled, num_scheduled)
        positions = num_computed.astype(np.int64)[rows] + within
        windows = plan_windows(positions + rows * STRIDE, points)

        firsts = np.flatnonzero(np.diff(windows.starts, prepend=-1))
        query_start_loc = np.append(firsts, len(rows)).astype(np.int32)
        seg_rows = rows[firsts]
        first_pages = begins[windows.first_images[firsts]]
        num_pages = ends[windows.end_images[firsts] - 1] - first_pages
        columns = np.arange(max(int(num_pages.max()), 1))
        used = columns < num_pages[:, None]
        index = np.where(used, (lens_offsets[seg_rows] + first_pages)[:, None] + columns, 0)
        starts = windows.starts - rows * STRIDE
        relative = positions - starts
        return SegmentPlan(
            query_start_loc=query_start_loc,
            rows=seg_rows.astype(np.int32),
            first_positions=positions[firsts].astype(np.int32),
            text_starts=starts[firsts].astype(np.int32),
            first_pages=first_pages,
            num_pages=num_pages,
            page_lens=np.where(used, lens[index], 0).astype(np.int32),
            relative_positions=relative,
            max_query_len=int(np.diff(query_start_loc).max()),
            max_text_len=int(relative.max()) + 1,
        )

    def _concatenated(self, request_ids: list[str]) -> tuple[np.ndarray, ...]:
        """Returns the concatenated layouts of the batch; cached while the batch stays the same."""
        if self._batch is not None and self._batch[0] == request_ids:
            return self._batch[1]
        rows = [self._rows[request_id] for request_id in request_ids]
        sizes = [len(row.points) for row in rows]
        offsets = np.repeat(np.arange(len(rows)) * STRIDE, sizes)
        lens = np.concatenate([row.page_lens for row in rows] + [np.zeros(1, np.int32)])
        num_pages = np.array([len(row.page_lens) for row in rows])
        arrays = (
            np.concatenate([row.points for row in rows]) + offsets,
            np.concatenate([row.page_begins for row in rows]),
            np.concatenate([row.page_ends for row in rows]),
            lens,
            np.cumsum(num_pages) - num_pages,
        )
        self._batch = (list(request_ids), arrays)
        return arrays
