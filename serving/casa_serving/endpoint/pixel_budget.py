"""A bound on the memory that decoded images take in one server process.

The limits on one image bound what one image costs, and images of requests are decoded a few
at a time, but each live session holds its latest frame. Each decoded image therefore takes its
pixels from one budget and gives them back when the last reference to it is gone, whichever way
its request ended.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager


class PixelBudget:
    """Pixels of decoded images that are alive; thread-safe, because images decode in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        """Pixels taken and not given back."""
        return self._in_flight

    def acquire(self, num_pixels: int, limit: int) -> bool:
        """Takes `num_pixels`; returns False, and takes nothing, if that would exceed `limit`."""
        with self._lock:
            if self._in_flight + num_pixels > limit:
                return False
            self._in_flight += num_pixels
            return True

    def release(self, num_pixels: int) -> None:
        """Returns pixels that were taken."""
        with self._lock:
            self._in_flight -= num_pixels

    @contextmanager
    def release_on_error(self, num_pixels: int) -> Iterator[None]:
        """Returns the pixels if the body raises; otherwise the body has found them an owner."""
        try:
            yield
        except BaseException:
            self.release(num_pixels)
            raise

    def release_with(self, owner: object, num_pixels: int) -> None:
        """Returns the pixels when `owner`, the decoded image, is no longer referenced."""
        weakref.finalize(owner, self.release, num_pixels)
