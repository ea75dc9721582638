"""Memory and processor time of this process, as Linux and torch count them."""

from __future__ import annotations

import time
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Linux: resets the peak of the resident set.
RESET_PEAK = "5"


class Meter:
    """Measures between `start` and `read`.

    Args:
        on_gpu: Whether memory is what torch has allocated on the GPU; else the resident memory of this process.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._cpu_s = 0.0

    def start(self) -> None:
        """Forget the peak so far."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            CLEAR.write_text(RESET_PEAK)
        self._cpu_s = time.process_time()

    def read(self) -> tuple[float, int]:
        """Return milliseconds of processor time of all threads, and the peak of memory in bytes."""
        cpu_ms = 1000 * (time.process_time() - self._cpu_s)
        return cpu_ms, torch.cuda.max_memory_allocated() if self._on_gpu else resident_peak_bytes()


def resident_peak_bytes() -> int:
    """Return the most memory that this process had since the peak was reset."""
    return _status_bytes("VmHWM")


def own_bytes() -> int:
    """Return the memory of this process that is mapped from no file."""
    return _status_bytes("RssAnon")


def _status_bytes(field: str) -> int:
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])
