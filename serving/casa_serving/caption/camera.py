"""Frames of a camera as it runs: always the newest one; what was not looked at in time is gone, never queued."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from casa_engine.errors import InputError
from casa_serving.caption.picture import Look, as_shown
from casa_serving.caption.video import Sample, import_av

if TYPE_CHECKING:
    import av

DEVICE_FOLDER = "/dev/"
MAX_SILENCE_S = 5.0


def is_camera(text: str) -> bool:
    """Whether the user means a device rather than a file."""
    return text.startswith(DEVICE_FOLDER)


class Camera:
    """A camera that a thread reads as fast as it delivers; a context manager.

    Args:
        device: Such as /dev/video0.
        input_format: FFmpeg's name for the kind of device: Video4Linux.
    """

    def __init__(self, device: str, input_format: str = "v4l2") -> None:
        self._device, self._format = device, input_format
        self._news = threading.Condition()
        self._latest: tuple[float, av.VideoFrame] | None = None
        self._fault: str | None = None
        self._closing = False

    def __enter__(self) -> Self:
        """Opens the device.

        Raises:
            InputError: it does not exist, is no camera, is in use or forbidden.
        """
        av = import_av()
        try:
            self._container = av.open(self._device, format=self._format)
        except (av.error.FFmpegError, OSError) as error:
            raise InputError(f"The camera {self._device!r} cannot be opened: {error.strerror}.") from error
        self._look = Look(self._container.streams.video[0].sample_aspect_ratio)
        self._thread = threading.Thread(target=self._read, name="camera", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Closes the device."""
        self._closing = True
        self._thread.join(MAX_SILENCE_S)
        if not self._thread.is_alive():  # A device that hangs is left to the end of the process.
            self._container.close()

    def samples(self, fps: float, max_seconds: float | None = None) -> Iterator[Sample]:
        """The newest frame at 0, 1/fps, 2/fps, ... seconds; moments that pass meanwhile are skipped.

        The timestamps are those of the frames' arrival, so they are not exact multiples of 1/fps.

        Raises:
            InputError: no frame came for `MAX_SILENCE_S`, or the device is gone.
        """
        begin, _ = self._newer_than(-math.inf)
        number, shown = 0, -math.inf
        while max_seconds is None or number / fps < max_seconds:
            time.sleep(max(0.0, begin + number / fps - time.monotonic()))
            shown, frame = self._newer_than(shown)
            yield Sample(shown - begin, as_shown(frame, self._look))
            number = max(number + 1, math.ceil((time.monotonic() - begin) * fps))

    def _newer_than(self, moment: float) -> tuple[float, av.VideoFrame]:
        """Waits for a frame that came after `moment`."""
        with self._news:
            came = self._news.wait_for(
                lambda: self._fault is not None or (self._latest is not None and self._latest[0] > moment),
                MAX_SILENCE_S,
            )
            if self._fault is not None or not came or self._latest is None:
                reason = self._fault or f"no frame for {MAX_SILENCE_S:g} s"
                raise InputError(f"The camera {self._device!r} stopped: {reason}.")
            return self._latest

    def _read(self) -> None:
        fault = "it delivers no more frames"
        try:
            for frame in self._container.decode(video=0):
                if self._closing:
                    return
                with self._news:
                    self._latest = (time.monotonic(), frame)
                    self._news.notify_all()
        except (import_av().error.FFmpegError, OSError) as error:
            fault = str(error.strerror)
        with self._news:
            self._fault = fault
            self._news.notify_all()
