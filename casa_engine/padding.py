"""Rows of unequal length as one array."""

from collections.abc import Sequence

import numpy as np


def pad_rows(rows: Sequence[Sequence[int] | np.ndarray], fill: int, left: bool = False) -> np.ndarray:
    """Returns int64 (B, longest): the rows, with `fill` behind those that are shorter (before them with `left`)."""
    padded = np.full((len(rows), max(map(len, rows), default=0)), fill, dtype=np.int64)
    for index, row in enumerate(rows):
        start = padded.shape[1] - len(row) if left else 0
        padded[index, start : start + len(row)] = row
    return padded
