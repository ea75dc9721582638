"""The few figures that the tables show of many measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return a percentile, linear between two values; None of nothing."""
    return float(np.percentile(values, percent)) if len(values) else None


def first_and_last(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Return the means of the first and of the last tenth, at least one value each; None where a value is missing."""
    known = list(values)
    if not known or None in known:
        return None
    tenth = max(1, len(known) // 10)
    return float(np.mean(known[:tenth])), float(np.mean(known[-tenth:]))
