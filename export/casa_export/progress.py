"""Progress on the terminal: a bar over the steps of a job, and a line for each with its time when it is done."""

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
        self.seconds: dict[str, float] = {}
        self._stream = stream
        # Without rates and times to come: no two steps take equally long.
        layout = "[{n_fmt}/{total_fmt}] {desc}"
        self._bar = tqdm(total=num_steps, file=stream, disable=stream is None, bar_format=layout, leave=False)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run one step; its name stands in the bar until it is done."""
        self._bar.set_description_str(f"{name} ...")
        started = time.perf_counter()
        try:
            yield
        except BaseException:
            self._end(f"{name}: failed")
            self._bar.close()
            raise
        self.seconds[name] = time.perf_counter() - started
        self._end(f"{name}: {self.seconds[name]:.1f} s")
        if self._bar.n == self._bar.total:
            self._bar.close()

    def _end(self, line: str) -> None:
        self._bar.update()
        if self._stream is not None:
            tqdm.write(f"[{self._bar.n}/{self._bar.total}] {line}", file=self._stream)
