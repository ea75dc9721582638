"""Progress on the terminal: the step under way, and a line for each with its time when it is done."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Counts the steps of a job.

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
        """Run one step; its name stands on the terminal until a line with its time takes its place."""
        self._step += 1
        # Without rates and times to come: no two steps take equally long.
        layout = {"bar_format": "[{n_fmt}/{total_fmt}] {desc} ...", "file": self.stream, "leave": False}
        started, outcome = time.perf_counter(), "failed"
        try:
            with tqdm(total=self.num_steps, initial=self._step, desc=name, disable=self.stream is None, **layout):
                yield
            self.seconds[name] = time.perf_counter() - started
            outcome = f"{self.seconds[name]:.1f} s"
        finally:
            if self.stream is not None:
                tqdm.write(f"[{self._step}/{self.num_steps}] {name}: {outcome}", file=self.stream)
