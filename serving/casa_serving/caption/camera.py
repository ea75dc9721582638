"""Frames of a running camera: always the latest one; frames that are not used in time are dropped, never queued."""

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
        input_format: FFmpeg's name of the kind of device; default: Video4Linux.
    """

    def __init__(self, device: str, input_format: str = "v4l2") -> None:
        self._device, self._format = device, input_format
        self._changed = threading.Condition()
        self._latest: tuple[float, av.VideoFrame] | None = None
        self._error: str | None = None
        self._closing = False

    def __enter__(self) -> Self:
        """Open the device.

        Raises:
            InputError: It does not exist, is no camera, is in use, or access is denied.
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
        """Close the device."""
        self._closing = True
        self._thread.join(MAX_SILENCE_S)
        if not self._thread.is_alive():  # The thread is a daemon: a device that hangs ends with the process.
            self._container.close()

    def samples(self, fps: float, max_seconds: float | None = None) -> Iterator[Sample]:
        """Yield the latest frame at 0, 1/fps, 2/fps, ... seconds; times that pass meanwhile are skipped.

        The timestamps are those of the frames' arrival, so they are not exact multiples of 1/fps.

        Raises:
            InputError: No frame arrived for `MAX_SILENCE_S`, or the device is gone.
        """
        begin, _ = self._newer_than(-math.inf)
        number, last_s = 0, -math.inf
        while max_seconds is None or number / fps < max_seconds:
            time.sleep(max(0.0, begin + number / fps - time.monotonic()))
            last_s, frame = self._newer_than(last_s)
            yield Sample(last_s - begin, as_shown(frame, self._look))
            number = max(number + 1, math.ceil((time.monotonic() - begin) * fps))

    def _newer_than(self, moment: float) -> tuple[float, av.VideoFrame]:
        """Wait for a frame that arrived after `moment`."""
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: self._error is not None or (self._latest is not None and self._latest[0] > moment),
                MAX_SILENCE_S,
            )
            if self._error is not None or not arrived or self._latest is None:
                reason = self._error or f"no frame for {MAX_SILENCE_S:g} s"
                raise InputError(f"The camera {self._device!r} stopped: {reason}.")
            return self._latest

    def _read(self) -> None:
        fault = "it delivers no more frames"
        try:
            for frame in self._container.decode(video=0):
                if self._closing:
                    return
                with self._changed:
                    self._latest = (time.monotonic(), frame)
                    self._changed.notify_all()
        except (import_av().error.FFmpegError, OSError) as error:
            fault = str(error.strerror)
        with self._changed:
            self._error = fault
            self._changed.notify_all()
