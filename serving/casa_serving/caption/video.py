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
from casa_serving.caption.picture import Look, as_shown, square_pixels

if TYPE_CHECKING:
    import av
    from PIL import Image

# FFmpeg's names, to its option `format_whitelist`, which also binds what a file would open in turn.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,gif,asf,ivf,mxf,yuv4mpegpipe"
OPEN_OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
# Formats whose clock begins at zero, whenever the first picture or sound comes, and whose header gives the real
# duration; the clock of others begins anywhere, and their duration is estimated from the bit rate.
MOV, MATROSKA = "mov", "matroska"
EXACT_FORMATS = {MOV, MATROSKA}
# FFmpeg's own decoders leave the transparency of these out.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
MAX_MISSING_S, MAX_MISSING_SHARE = 1.0, 0.02
MAX_FRAME_PIXELS = 8192 * 8192
# Timestamps are rounded to the clock of the file, often to milliseconds.
CLOCK_TOLERANCE_S = 1e-3


@dataclass(frozen=True)
class VideoInfo:
    """What the first pass found.

    Attributes:
        path: The file.
        stream: The number of its video among all its streams.
        begin_s: When the first frame is shown, on the file's own clock.
        end_s: When the last one ends.
        start_s: When the first picture or sound comes, on that clock.
        zero_s: What a player calls the beginning, on that clock: what comes late is waited for.
        stated_end_s: Where the file's header says it all ends, sound included; None if it does not say.
        found_end_s: Where it all ends, sound included.
    """

    path: Path
    stream: int
    begin_s: float
    end_s: float
    start_s: float
    zero_s: float
    stated_end_s: float | None
    found_end_s: float

    @property
    def duration_s(self) -> float:
        """Of the video alone."""
        return self.end_s - self.begin_s

    @property
    def late_s(self) -> float:
        """How long a player waits for the first frame."""
        return self.begin_s - self.zero_s

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
    """Open a file and find its video.

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
    """The video stream that a browser shows; a picture of an album's cover, which also counts as one, is none."""
    av = import_av()
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise InputError(f"{str(path)!r} has no video stream; found: {kinds}.")
    # In the others the flag is a matter of taste, which browsers do not follow.
    chosen = [
        stream for stream in streams if is_of(container, {MOV}) and stream.disposition & av.stream.Disposition.default
    ]
    stream = [*chosen, *streams][0]
    width, height = square_pixels(stream.codec_context.width, stream.codec_context.height, stream.sample_aspect_ratio)
    if width * height > MAX_FRAME_PIXELS:
        raise InputError(f"Frames of {str(path)!r} are {width} x {height} px; at most {MAX_FRAME_PIXELS} px are read.")
    return stream


def is_of(container: av.container.InputContainer, formats: set[str]) -> bool:
    """Return whether a file is of one of these formats; FFmpeg gives some formats several names."""
    return bool(formats & set(container.format.name.split(",")))


def scan(path: Path) -> VideoInfo:
    """The first pass: reads all packets and decodes none.

    Raises:
        InputError: as `open_video`; or there is no frame, or no time passes between the first and the end.
    """
    container, video = open_video(path)
    begin_s, last_s, end_s, found_end_s = math.inf, -math.inf, -math.inf, -math.inf
    with container, readable(path):
        for packet in container.demux():
            time = packet.dts if packet.pts is None else packet.pts
            if time is None or packet.is_discard:
                continue  # The last packet of a stream is an empty one.
            start, end = (float(moment * packet.time_base) for moment in (time, time + (packet.duration or 0)))
            found_end_s = max(found_end_s, end)
            # Packets come in the order of decoding; only of the last one that is shown the duration says when it ends.
            if packet.stream is video and start >= last_s:
                last_s, end_s = start, end
            if packet.stream is video:
                begin_s = min(begin_s, start)
        if not end_s > begin_s:
            raise InputError(f"The video {str(path)!r} has no duration: no frames, or none that lasts.")
        # FFmpeg leaves out of it what a decoder of sound needs and nobody hears.
        start_s = begin_s if container.start_time is None else container.start_time / import_av().time_base
        zero_s = min(0.0, start_s) if is_of(container, EXACT_FORMATS) else start_s
        return VideoInfo(path, video.index, begin_s, end_s, start_s, zero_s, stated_end_s(container), found_end_s)


def stated_end_s(container: av.container.InputContainer) -> float | None:
    """Where the header says that it ends, if the format has such a header."""
    if not is_of(container, EXACT_FORMATS) or not container.duration:
        return None
    # What Matroska calls the duration is the end.
    begin = container.start_time or 0 if is_of(container, {MOV}) else 0
    return (container.duration + begin) / import_av().time_base


def check_complete(info: VideoInfo, max_seconds: float | None) -> None:
    """Refuse a truncated video, unless only what is there is asked for.

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
    look: Look | None = None
    with container, readable(info.path):
        for frame in decode(container, video):
            look = look or Look.of(video, frame)
            time = time_of(frame, video, info)
            while shown is not None and number < total and number / fps + CLOCK_TOLERANCE_S < time:
                yield Sample(number / fps, as_shown(shown, look))
                number += 1
            if number == total:
                return
            shown = frame
    if shown is None or look is None:
        raise InputError(f"Not one frame of {str(info.path)!r} can be decoded: it is damaged.")
    for last in range(number, total):
        yield Sample(last / fps, as_shown(shown, look))


def decode(container: av.container.InputContainer, video: av.VideoStream) -> Iterator[av.VideoFrame]:
    """The frames of a stream, with their transparency if it has one."""
    name = ALPHA_DECODERS.get(video.codec_context.name) if video.metadata.get("alpha_mode") == "1" else None
    if name is None:
        video.thread_type = "AUTO"
        yield from container.decode(video)
        return
    decoder = import_av().CodecContext.create(name, "r")
    for packet in container.demux(video):
        yield from decoder.decode(packet)


def time_of(frame: av.VideoFrame, video: av.VideoStream, info: VideoInfo) -> float:
    """When a frame is shown, in seconds since the first one; one without a time is there from the beginning."""
    time = frame.dts if frame.pts is None else frame.pts
    return 0.0 if time is None else float(time * video.time_base) - info.begin_s


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what FFmpeg says about damage into a sentence."""
    av = import_av()
    try:
        yield
    except av.error.FFmpegError as error:
        raise InputError(f"The video {str(path)!r} is damaged ({error.strerror}).") from error


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of the first frame as it is shown."""
    container, video = open_video(path)
    with container, readable(path):
        frame = next(decode(container, video))
        return as_shown(frame, Look.of(video, frame)).size
