"""Limit on the memory of decoded images in one server process.

The limits on one image bound the cost of one image, and images of requests are decoded a few at a
time, but each live session keeps its latest frame. Each decoded image therefore acquires its pixels
from one budget and releases them when the last reference to it is gone, however its request ended.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager


class PixelBudget:
    """Counts pixels of decoded images in memory; thread-safe, because images are decoded in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        """Pixels acquired and not released."""
        return self._in_flight

    def acquire(self, num_pixels: int, limit: int) -> bool:
        """Acquire `num_pixels`; return False, and acquire nothing, if that would exceed `limit`."""
        with self._lock:
            if self._in_flight + num_pixels > limit:
                return False
            self._in_flight += num_pixels
            return True

    def release(self, num_pixels: int) -> None:
        """Release pixels."""
        with self._lock:
            self._in_flight -= num_pixels

    @contextmanager
    def release_on_error(self, num_pixels: int) -> Iterator[None]:
        """Release the pixels if the body raises; otherwise the body has called `release_with`."""
        try:
            yield
        except BaseException:
            self.release(num_pixels)
            raise

    def release_with(self, owner: object, num_pixels: int) -> None:
        """Release the pixels when `owner`, the decoded image, is no longer referenced."""
        weakref.finalize(owner, self.release, num_pixels)
