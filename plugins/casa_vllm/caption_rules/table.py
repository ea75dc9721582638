"""The table of the captioner's rules: rows of requests, kept on the device."""

import numpy as np
import torch

from casa_engine.live.caption_logits import MAX_STOP_IDS
from casa_vllm.caption_rules.numpy_rules import numpy_apply_rules
from casa_vllm.caption_rules.remembered import RememberedRow
from casa_vllm.caption_rules.staging import copy_together
from casa_vllm.caption_rules.tensors import LOG_PENALTY, NUM_STOPS, PAGE, RuleTensors


class CaptionTable:
    """State of the rules of up to `num_rows` requests.

    The host knows which pages a row has and at most how many tokens it remembers; what they are, and how often they
    were said, is known on the device alone. Rows are written when the next batch is sampled, all in one copy.

    Args:
        num_rows: S, most requests at once.
        device: Of the logits.
        use_triton: Run the Triton kernels (GPU, or CPU under Triton's interpreter).
    """

    def __init__(self, num_rows: int, device: torch.device, *, use_triton: bool) -> None:
        self._device, self._use_triton = device, use_triton
        self._tensors = RuleTensors.neutral(num_rows, device)
        self._free_pages = list(range(len(self._tensors.ids)))[::-1]
        self._pages: list[list[int]] = [[] for _ in range(num_rows)]
        self._staged: dict[int, RememberedRow] = {}
        # By row: whether it has rules and counts tokens, how many it remembers at most, and how many it has room for.
        self._is_used = np.zeros(num_rows, bool)
        self._is_counting = np.zeros(num_rows, bool)
        self._max_ids = np.zeros(num_rows, np.int64)
        self._capacity = np.zeros(num_rows, np.int64)

    def write(self, row: int, remembered: RememberedRow) -> None:
        """Replace a row."""
        self._free_pages += self._pages[row]
        self._pages[row] = self._take_pages(-(-len(remembered.ids) // PAGE))
        self._staged[row] = remembered
        self._is_used[row] = True
        self._is_counting[row] = remembered.numbers[LOG_PENALTY] != 0
        self._max_ids[row] = len(remembered.ids)
        self._capacity[row] = len(self._pages[row]) * PAGE

    def clear(self, row: int) -> None:
        """Leave a row without rules."""
        if self._is_used[row]:
            self.write(row, RememberedRow.neutral())
            self._is_used[row] = False

    def has_rules(self, rows: np.ndarray) -> bool:
        """Return whether any of these rows has rules; rows are (B,), -1 for none."""
        return bool(self._is_used[rows[rows >= 0]].any())

    def apply(self, logits: torch.Tensor, rows: torch.Tensor, new_ids: torch.Tensor, host_rows: np.ndarray) -> None:
        """Count the tokens sampled last and apply the rules to the next choice of every row.

        Args:
            logits: (B, V), the elements of a row side by side; on a CPU float32.
            rows: (B,) int32 or int64 on the device, row of the table of each row of logits, each at most once; -1
                for none.
            new_ids: (B,) int32 or int64 on the device, the token sampled last where it was not counted yet; otherwise
                -1, and the row's state does not change.
            host_rows: `rows` on the host.

        Mutates:
            logits, and the rows of the table.
        """
        if self._staged:
            self._write_staged()
        self._grow(host_rows)
        if self._use_triton:
            # Triton is not there on every CPU installation.
            from casa_vllm.caption_rules.triton_rules import triton_apply_rules

            triton_apply_rules(logits, rows, new_ids, self._tensors)
        else:
            numpy_apply_rules(logits, rows, new_ids, self._tensors)

    def _take_pages(self, count: int) -> list[int]:
        """Return free pages, of a larger pool if there are too few."""
        if count > len(self._free_pages):
            num_pages = len(self._tensors.ids)
            self._tensors.reserve(num_pages + count - len(self._free_pages), 0)
            self._free_pages += range(num_pages, len(self._tensors.ids))
        return [self._free_pages.pop() for _ in range(count)]

    def _grow(self, host_rows: np.ndarray) -> None:
        """Give a page to each row whose next token may need one."""
        rows = host_rows[host_rows >= 0]
        rows = rows[self._is_counting[rows]]
        self._max_ids[rows] += 1
        rows = rows[self._max_ids[rows] > self._capacity[rows]]
        if not len(rows):
            return
        columns, pages = self._capacity[rows] // PAGE, self._take_pages(len(rows))
        self._capacity[rows] += PAGE
        for row, page in zip(rows.tolist(), pages, strict=True):
            self._pages[row].append(page)
        self._tensors.reserve(0, int(columns.max()) + 1)
        rows, columns, pages = copy_together((rows, columns, np.array(pages)), self._device)
        self._tensors.page_table[rows, columns] = pages.int()
        self._tensors.ids.index_fill_(0, pages, -1)

    def _write_staged(self) -> None:
        """Write the staged rows to the device: one copy, and one scatter for each tensor."""
        tensors, rows, staged = self._tensors, np.array(list(self._staged)), list(self._staged.values())
        pages = [np.array(self._pages[row], np.int64) for row in self._staged]
        num_pages = [len(own) for own in pages]
        tensors.reserve(0, max(num_pages))
        sizes = np.zeros((len(rows), NUM_STOPS + 1), np.int32)
        sizes[:] = [(len(row.ids), len(row.recent), *row.ngram, len(row.stop_ids)) for row in staged]
        arrays = (
            rows,
            sizes,
            np.array([row.numbers for row in staged], np.float64),
            _padded([row.recent for row in staged], 0),
            _padded([row.stop_ids for row in staged], -1, MAX_STOP_IDS),
            _padded(pages, 0),
            np.concatenate(pages),
            _paged([row.ids for row in staged], num_pages, -1, np.int32),
            _paged([row.counts for row in staged], num_pages, 0, np.float64),
        )
        rows, sizes, numbers, recent, stop_ids, table, pages, ids, counts = copy_together(arrays, self._device)
        tensors.sizes.index_copy_(0, rows, sizes)
        tensors.numbers.index_copy_(0, rows, numbers)
        tensors.recent[:, : recent.shape[1]].index_copy_(0, rows, recent)
        tensors.stop_ids.index_copy_(0, rows, stop_ids)
        tensors.page_table[:, : table.shape[1]].index_copy_(0, rows, table)
        tensors.ids.index_copy_(0, pages, ids)
        tensors.counts.index_copy_(0, pages, counts)
        self._staged.clear()


def _padded(values: list[np.ndarray], filler: int, width: int | None = None) -> np.ndarray:
    """Return int32 (rows, width), by default as wide as the longest."""
    padded = np.full((len(values), width or max(map(len, values))), filler, np.int32)
    for row, value in zip(padded, values, strict=True):
        row[: len(value)] = value
    return padded


def _paged(values: list[np.ndarray], num_pages: list[int], filler: int, dtype: type) -> np.ndarray:
    """Return (pages, PAGE): each value's elements in pages of its own."""
    paged, first = np.full((sum(num_pages), PAGE), filler, dtype), 0
    for value, count in zip(values, num_pages, strict=True):
        paged[first : first + count].reshape(-1)[: len(value)] = value
        first += count
    return paged
