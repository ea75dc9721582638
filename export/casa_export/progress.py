"""Progress on the terminal: one line a step, with its time when it is done."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class Progress:
    """Counts steps of a job and writes a line for each.

    Args:
        num_steps: How many there will be.
        stream: Where to write; None keeps silent.

    Attributes:
        seconds: Name and duration of each finished step.
    """

    def __init__(self, num_steps: int, stream: TextIO | None = sys.stderr) -> None:
        self.num_steps, self.stream = num_steps, stream
        self.seconds: dict[str, float] = {}
        self._step = 0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Runs one step; its line appears at once and is completed at the end."""
        self._step += 1
        self._write(f"[{self._step}/{self.num_steps}] {name} ... ")
        started = time.perf_counter()
        try:
            yield
        except BaseException:
            self._write("failed\n")
            raise
        self.seconds[name] = time.perf_counter() - started
        self._write(f"{self.seconds[name]:.1f} s\n")

    def _write(self, text: str) -> None:
        if self.stream is not None:
            self.stream.write(text)
            self.stream.flush()
