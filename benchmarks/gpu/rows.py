"""One measured figure: printed at once, and a JSON line in the file of its stage."""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def shown(value: float) -> str:
    """Return four digits of a figure, or all of a large one."""
    return f"{value:,.0f}" if value >= 10_000 else f"{value:.4g}"


class Rows:
    """The results of a stage.

    Args:
        path: File to append to, so that a stage that is cut off leaves what it has measured.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, what: str, case: str, value: float, unit: str = "ms", floor: float | None = None) -> None:
        """Add a figure.

        Args:
            what: What was measured, e.g. "decode step".
            case: Model and sizes.
            value: The figure; of repeated calls their median.
            unit: Its unit; "" for a ratio or a count.
            floor: What the hardware allows at best, in the same unit; None where that has no meaning.
        """
        self._append({"what": what, "case": case, "value": value, "unit": unit, "floor": floor})
        beside = "" if floor is None else f", floor {floor:.3f} ({value / floor:.2f}x)"
        print(f"{what}, {case}: {shown(value)} {unit}{beside}", flush=True)

    def check(self, what: str, case: str, value: float, bound: float) -> bool:
        """Add an error that must be within a bound; return whether it is. NaN is not."""
        is_within = value <= bound
        self._append({"what": what, "case": case, "value": value, "unit": "", "floor": None, "bound": bound})
        print(f"{'ok  ' if is_within else 'FAIL'} {what}, {case}: {value:.2e} (at most {bound:.0e})", flush=True)
        return is_within

    def _append(self, row: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def median_ms(function: Callable[[], Any], device: torch.device, repeats: int = 20, warmup: int = 3) -> float:
    """Median milliseconds of a call, by CUDA events on a GPU.

    Args:
        function: What to time; on a GPU it may return before the device is done.
        device: Where it runs.
        repeats: Timed calls.
        warmup: Calls before, for compilation and caches.
    """
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def leave() -> None:
    """End the process at once: an engine's threads and compile workers take seconds of the machine's to tidy up."""
    os._exit(0)
