"""Frames of a video file at a given rate: the frame that is on the screen at each moment, in order, one at a time.

A file is read twice. The first pass reads packets without decoding them: it finds where the video really begins and
ends, whatever the header says (some files have no duration, some a wrong one). The second decodes as a stream and
keeps one frame, so that an hour costs no more memory than a second. What is seen at begin + i/fps is the last frame
that has begun by then, whatever the rate of the video, constant or not:

    frames   |a    |b |c     |d    |e   end       fps = 2: a, b, c, d; the slot of the last sample lies within
    samples  0     0.5    1.0    1.5      2.0     the video, as in the published captioner

Only real containers are opened (`FORMATS`). FFmpeg would also take text files that name other files or addresses
(playlists) and follow them, and would show a plain text as a picture of a terminal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from casa_engine.errors import InputError

if TYPE_CHECKING:
    import av
    from PIL import Image

# FFmpeg's names, to its option `format_whitelist`, which also binds what a file would open in turn.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,gif,asf,ivf,mxf,yuv4mpegpipe"
OPEN_OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
# Formats whose header gives the real duration; others estimate it from the bit rate.
EXACT_FORMATS = {"mov", "matroska"}
MAX_MISSING_S, MAX_MISSING_SHARE = 1.0, 0.02
MAX_FRAME_PIXELS = 8192 * 8192
# Timestamps are rounded to the clock of the file, often to milliseconds.
CLOCK_TOLERANCE_S = 1e-3


@dataclass(frozen=True)
class VideoInfo:
    """What the first pass found.

    Attributes:
        path: The file.
        begin_s: When the first frame is shown, on the file's own clock.
        end_s: When the last one ends.
        stated_end_s: Where the file's header says it all ends, sound included; None if it does not say.
        found_end_s: Where it all ends, sound included.
    """

    path: Path
    begin_s: float
    end_s: float
    stated_end_s: float | None
    found_end_s: float

    @property
    def duration_s(self) -> float:
        """Of the video alone."""
        return self.end_s - self.begin_s

    @property
    def is_truncated(self) -> bool:
        """Whether the header promises notably more than there is."""
        if self.stated_end_s is None:
            return False
        return self.stated_end_s - self.found_end_s > max(MAX_MISSING_S, MAX_MISSING_SHARE * self.stated_end_s)

    def num_samples(self, fps: float, max_seconds: float | None = None) -> int:
        """How many frames `sample` gives: those whose slot of 1/fps lies within the video, but at least one."""
        seconds = self.duration_s if max_seconds is None else min(self.duration_s, max_seconds)
        return max(1, math.floor((seconds + CLOCK_TOLERANCE_S) * fps))


@dataclass(frozen=True)
class Sample:
    """What is seen at `timestamp`, in seconds since the video began; RGB, upright."""

    timestamp: float
    image: Image.Image


def import_av() -> ModuleType:
    """PyAV.

    Raises:
        InputError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise InputError(
            "Videos are read with PyAV, which is not installed: pip install 'casa-engine[live]'."
        ) from error
    return av


def open_video(path: Path) -> tuple[av.container.InputContainer, av.VideoStream]:
    """Opens a file and finds its video.

    Raises:
        InputError: it does not exist, is no video, has only sound, or its frames are beyond all measure.
    """
    av = import_av()
    if not path.is_file():
        raise InputError(f"The video {str(path)!r} {'is not a file' if path.exists() else 'does not exist'}.")
    try:
        container = av.open(str(path), options=OPEN_OPTIONS)
    except (av.error.FFmpegError, OSError) as error:
        # "Invalid argument" is how FFmpeg calls a format that is not among `FORMATS`.
        reason = "unknown format" if isinstance(error, av.error.ArgumentError) else error.strerror
        raise InputError(
            f"{str(path)!r} is not a video that can be read, or is cut off or damaged ({reason}). Expected MP4, MOV, "
            "WebM, Matroska, AVI, MPEG, FLV, Ogg or GIF."
        ) from error
    try:
        return container, video_stream(container, path)
    except InputError:
        container.close()
        raise


def video_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    """The first video stream; a picture of an album's cover, which also counts as one, is none."""
    av = import_av()
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise InputError(f"{str(path)!r} has no video stream; found: {kinds}.")
    width, height = streams[0].codec_context.width, streams[0].codec_context.height
    if width * height > MAX_FRAME_PIXELS:
        raise InputError(f"Frames of {str(path)!r} are {width} x {height} px; at most {MAX_FRAME_PIXELS} px are read.")
    return streams[0]


def scan(path: Path) -> VideoInfo:
    """The first pass: reads all packets and decodes none.

    Raises:
        InputError: as `open_video`; or there is no frame, or no time passes between the first and the end.
    """
    container, video = open_video(path)
    begin_s, end_s, found_end_s = math.inf, -math.inf, -math.inf
    with container, readable(path):
        for packet in container.demux():
            time = packet.dts if packet.pts is None else packet.pts
            if time is None or packet.is_discard:
                continue  # The last packet of a stream is an empty one.
            start, end = (float(moment * packet.time_base) for moment in (time, time + (packet.duration or 0)))
            found_end_s = max(found_end_s, end)
            if packet.stream is video:
                begin_s, end_s = min(begin_s, start), max(end_s, end)
        if not end_s > begin_s:
            raise InputError(f"The video {str(path)!r} has no duration: no frames, or none that lasts.")
        return VideoInfo(path, begin_s, end_s, stated_end_s(container), found_end_s)


def stated_end_s(container: av.container.InputContainer) -> float | None:
    """Where the header says that it ends, if the format has such a header."""
    if not EXACT_FORMATS & set(container.format.name.split(",")) or not container.duration:
        return None
    return (container.duration + (container.start_time or 0)) / import_av().time_base


def check_complete(info: VideoInfo, max_seconds: float | None) -> None:
    """Refuses a truncated video, unless only what is there is asked for.

    Raises:
        InputError: naming what is there.
    """
    if info.is_truncated and (max_seconds is None or max_seconds > info.duration_s):
        raise InputError(
            f"The video {str(info.path)!r} is truncated: its header says that it ends at {info.stated_end_s:.1f} s, "
            f"the last frame ends at {info.end_s:.1f} s. Get the whole file, or take what is there with "
            f"--max-seconds {math.floor(info.duration_s)}."
        )


def sample(info: VideoInfo, fps: float, max_seconds: float | None = None) -> Iterator[Sample]:
    """The second pass: what is seen at 0, 1/fps, 2/fps, ... seconds after the beginning.

    Raises:
        InputError: the file is damaged somewhere in the middle.
    """
    total, number, shown = info.num_samples(fps, max_seconds), 0, None
    container, video = open_video(info.path)
    video.thread_type = "AUTO"
    with container, readable(info.path):
        for frame in container.decode(video):
            time = float((frame.dts if frame.pts is None else frame.pts) * frame.time_base) - info.begin_s
            while shown is not None and number < total and number / fps + CLOCK_TOLERANCE_S < time:
                yield Sample(number / fps, upright(shown))
                number += 1
            if number == total:
                return
            shown = frame
    if shown is None:
        raise InputError(f"Not one frame of {str(info.path)!r} can be decoded: it is damaged.")
    for last in range(number, total):
        yield Sample(last / fps, upright(shown))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what FFmpeg says about damage into a sentence."""
    av = import_av()
    try:
        yield
    except av.error.FFmpegError as error:
        raise InputError(f"The video {str(path)!r} is damaged ({error.strerror}).") from error


def upright(frame: av.VideoFrame) -> Image.Image:
    """A frame as RGB, turned as its file says that it is to be shown."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of the first frame as it is shown."""
    container, video = open_video(path)
    with container, readable(path):
        return upright(next(container.decode(video))).size
