"""The window of every request of a worker, and the segments of a step over these windows.

Independent of the runner. A request has a row, whose state is its current window: that of the first token which its
next step computes. Decoding stays in the last window, so a step only compares; a prefill moves the window on:

    request A, image at 4      row of A    start  end  first page  pages | valid tokens of each page of the row
      t0 t1 t2 t3 | t4 t5 ..   before t4       0    4           0      0 | 16 16 9
                               from t4 on      4    -           0      3 | 16 16 9

The rule that says which window a token has is `casa_engine.windows`; it is asked when a row is added. A step in which
no request has tokens of two windows has a segment a request, and nothing but the rows is needed to build them. Only a
prefill with an image among its tokens is split, on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from casa_engine.windows import plan_windows
from casa_vllm.ops.segments import NUM_PAGES, PAGE_LENS, START
from casa_vllm.request_images import RequestImages

# End of the last window: beyond any text position.
NO_END = 1 << 40


@dataclass(frozen=True)
class RowWindows:
    """All windows of a request, W of them, in order.

    Attributes:
        windows: (W, 3) int64, columns START, FIRST_PAGE, NUM_PAGES. Windows that no token could see any more when the
            row was sent have no pages.
        ends: (W,) int64, text position after the last token of each window.
        page_begins: (M + 1,) int64, where the pages of each image begin in the row, and the row's length.
    """

    windows: np.ndarray
    ends: np.ndarray
    page_begins: np.ndarray

    @classmethod
    def of(cls, images: RequestImages, num_computed_tokens: int, block_size: int) -> "RowWindows":
        """Return the windows of a row that is sent when `num_computed_tokens` tokens are computed."""
        num_pages = images.num_pages(block_size)
        num_pages[: images.first_live(num_computed_tokens)] = 0
        begins = np.concatenate(([0], np.cumsum(num_pages)))
        plan = plan_windows(np.unique(np.concatenate(([0], images.points))), images.points)
        first_pages = begins[plan.first_images]
        windows = np.stack((plan.starts, first_pages, begins[plan.end_images] - first_pages), axis=1)
        return cls(windows, np.append(plan.starts[1:], NO_END), begins)

    def index_at(self, position: int) -> int:
        """Return the index of the window of the token at a text position."""
        return int(np.searchsorted(self.ends, position, side="right"))


@dataclass(frozen=True)
class SegmentPlan:
    """What the host knows of the V segments of a step over R requests and T tokens.

    Attributes:
        splits: None where segment v is the whole of request v, in its current window; otherwise (V, 4) int32: request,
            START, FIRST_PAGE, NUM_PAGES.
        query_start_loc: None likewise; otherwise (V + 1,) int32.
        num_segments: V.
        num_tokens: T.
        max_query_len: Tokens of the longest segment.
        max_text_len: Bound on the tokens from a window's start to a query, the query included.
        max_pages: Image pages of the widest segment; 0: no segment has an image.
    """

    splits: np.ndarray | None
    query_start_loc: np.ndarray | None
    num_segments: int
    num_tokens: int
    max_query_len: int
    max_text_len: int
    max_pages: int

    @classmethod
    def without_images(cls, num_computed: np.ndarray, num_scheduled: np.ndarray) -> "SegmentPlan":
        """Return the plan of R requests without images, of which (R,) and (R,) tokens are computed and scheduled."""
        return cls.of_requests(num_scheduled, num_computed + num_scheduled, max_pages=0)

    @classmethod
    def of_requests(cls, num_scheduled: np.ndarray, text_lens: np.ndarray, max_pages: int) -> "SegmentPlan":
        """Return the plan of R requests that are a segment each.

        Args:
            num_scheduled: (R,) int, text tokens of the step.
            text_lens: (R,) int, text of the window up to the last of them.
            max_pages: Image pages of the window that has most.
        """
        return cls(
            splits=None,
            query_start_loc=None,
            num_segments=len(num_scheduled),
            num_tokens=int(num_scheduled.sum()),
            max_query_len=int(num_scheduled.max()),
            max_text_len=int(text_lens.max()),
            max_pages=max_pages,
        )


class WindowStates:
    """The requests' current windows, an array row each.

    Args:
        num_rows: How many rows there are.
        row_pages: Most pages of a row.
        window_pages: Most pages of a window: a decode graph's buffers have no more columns.
        block_size: Image tokens of a page.

    Attributes:
        table: (rows, 3 + row_pages) int32: START, FIRST_PAGE, NUM_PAGES, and the valid tokens of each page.
        changed: For each row that changed since this was last cleared, how many of its values, from the first on.
    """

    def __init__(self, num_rows: int, row_pages: int, window_pages: int, block_size: int) -> None:
        self.block_size, self._window_pages = block_size, window_pages
        self.table = np.zeros((num_rows, PAGE_LENS + row_pages), dtype=np.int32)
        self.changed: dict[int, int] = {}
        self._ends = np.full(num_rows, NO_END, dtype=np.int64)
        self._rows: list[RowWindows | None] = [None] * num_rows

    def grow(self) -> None:
        """Double the number of rows. Mutates `table`, which is another array afterwards."""
        self._rows += [None] * len(self._rows)
        self.table = np.concatenate((self.table, np.zeros_like(self.table)))
        self._ends = np.concatenate((self._ends, np.full_like(self._ends, NO_END)))

    def add_row(self, row: int, features: Sequence[Any], num_computed_tokens: int) -> None:
        """Write the row that was sent for a new or resumed request, or for a session's next chunk.

        Args:
            row: Which row.
            features: vLLM's multimodal features of the request.
            num_computed_tokens: Text tokens computed before.

        Raises:
            RuntimeError: Its pages do not fit into a row, or those of a window into a step: the scheduler prevents it.
        """
        images = RequestImages.from_features(features)
        windows = RowWindows.of(images, num_computed_tokens, self.block_size)
        num_pages, row_pages = int(windows.page_begins[-1]), self.table.shape[1] - PAGE_LENS
        if num_pages > row_pages:
            raise RuntimeError(f"a request's images need {num_pages} pages; a row has {row_pages}.")
        widest = int(windows.windows[:, NUM_PAGES].max())
        if widest > self._window_pages:
            raise RuntimeError(f"a window's images need {widest} pages; a step has {self._window_pages}.")
        lens = np.full(num_pages, self.block_size)
        has_pages = np.diff(windows.page_begins) > 0
        last_pages = windows.page_begins[1:][has_pages] - 1
        lens[last_pages] = (images.num_tokens[has_pages] - 1) % self.block_size + 1
        self.table[row, PAGE_LENS : PAGE_LENS + num_pages] = lens
        self._rows[row] = windows
        self._enter(row, num_computed_tokens)
        self.changed[row] = PAGE_LENS + num_pages

    def pages_of(self, row: int, image: int) -> slice:
        """Return where the pages of an image are in the row that was sent."""
        begins = self._rows[row].page_begins
        return slice(int(begins[image]), int(begins[image + 1]))

    def advance(self, rows: np.ndarray, positions: np.ndarray) -> None:
        """Move the rows (R,) on to the windows of the tokens at these positions (R,). Mutates those that change."""
        for request in np.flatnonzero(positions >= self._ends[rows]):
            self._enter(rows[request], int(positions[request]))

    def plan(self, rows: np.ndarray, num_computed: np.ndarray, num_scheduled: np.ndarray) -> SegmentPlan:
        """Plan one step.

        Args:
            rows: (R,) int, rows of the scheduled requests, in batch order.
            num_computed: (R,) int, text tokens computed before the step.
            num_scheduled: (R,) int, text tokens of the step, at least 1 each.

        Mutates:
            The rows of requests that enter another window with the first token of the step.
        """
        self.advance(rows, num_computed)
        windows, ends = self.table[rows, :PAGE_LENS], num_computed + num_scheduled
        crossing = np.flatnonzero(ends > self._ends[rows])
        if crossing.size:
            return self._split(rows, windows, num_computed, ends, crossing)
        return SegmentPlan.of_requests(num_scheduled, ends - windows[:, START], int(windows[:, NUM_PAGES].max()))

    def _enter(self, row: int, position: int) -> None:
        """Set the row's current window to that of the token at a text position."""
        windows = self._rows[row]
        index = windows.index_at(position)
        self.table[row, :PAGE_LENS] = windows.windows[index]
        self._ends[row] = windows.ends[index]
        self.changed.setdefault(int(row), PAGE_LENS)

    def _split(
        self, rows: np.ndarray, windows: np.ndarray, begins: np.ndarray, ends: np.ndarray, crossing: np.ndarray
    ) -> SegmentPlan:
        """Plan a step in which the requests `crossing` have tokens of several windows."""
        num_segments = np.ones(len(rows), dtype=np.int64)
        crossed = []
        for request in crossing:
            row = self._rows[rows[request]]
            part = slice(row.index_at(begins[request]), row.index_at(ends[request] - 1) + 1)
            crossed.append(row.windows[part])
            num_segments[request] = part.stop - part.start
        requests = np.repeat(np.arange(len(rows)), num_segments)
        windows = windows[requests]
        windows[np.isin(requests, crossing)] = np.concatenate(crossed)
        firsts = np.maximum(begins[requests], windows[:, START])
        num_tokens = ends - begins
        offsets = np.cumsum(num_tokens) - num_tokens - begins
        query_start_loc = np.append(offsets[requests] + firsts, num_tokens.sum()).astype(np.int32)
        lens = np.diff(query_start_loc)
        return SegmentPlan(
            splits=np.column_stack((requests, windows)).astype(np.int32),
            query_start_loc=query_start_loc,
            num_segments=len(requests),
            num_tokens=int(query_start_loc[-1]),
            max_query_len=int(lens.max()),
            max_text_len=int((firsts + lens - windows[:, START]).max()),
            max_pages=int(windows[:, NUM_PAGES].max()),
        )
