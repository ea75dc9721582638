"""Rows of unequal length as one array."""

from collections.abc import Sequence

import numpy as np


def pad_rows(rows: Sequence[Sequence[int] | np.ndarray], fill: int, left: bool = False, length: int = 0) -> np.ndarray:
    """Return int64 (B, longest, or `length` if that is more): the rows, filled up behind (before them with `left`)."""
    longest = max(map(len, rows), default=0)
    padded = np.full((len(rows), max(longest, length)), fill, dtype=np.int64)
    for index, row in enumerate(rows):
        start = padded.shape[1] - len(row) if left else 0
        padded[index, start : start + len(row)] = row
    return padded
