"""Timing that is right on a GPU (CUDA events) and possible on a CPU, and the results file."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def median_ms(function: Callable[[], Any], device: torch.device, repeats: int = 20, warmup: int = 3) -> float:
    """Median milliseconds of a call.

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


def record(path: Path, what: str, case: str, measured_ms: float, floor_ms: float | None) -> None:
    """Appends one result as a JSON line and shows it.

    Args:
        path: The results file.
        what: What was measured, e.g. "decode step".
        case: Model and sizes.
        measured_ms: Median.
        floor_ms: Least possible time on the hardware of `floors.py`; None where it has no meaning.
    """
    row = {"what": what, "case": case, "measured_ms": measured_ms, "floor_ms": floor_ms}
    with path.open("a") as results:
        results.write(json.dumps(row) + "\n")
    floor = "" if floor_ms is None else f", floor {floor_ms:.3f} ms"
    print(f"{what}, {case}: {measured_ms:.3f} ms{floor}", flush=True)
