"""Captions as files: SRT and WebVTT for players, ASS to be burned in, JSON lines for programs.

A caption is shown until the next one begins, at most `MAX_CAPTION_S`, and not beyond the video. Silent frames have no
entry in subtitles; in the JSON lines every frame has one.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

from casa_engine.errors import InputError
from casa_serving.live.results import FrameResult

if TYPE_CHECKING:
    import pysubs2

MAX_CAPTION_S = 10.0
FORMATS = ("srt", "vtt", "jsonl")
# Replacements of characters with a meaning in one of the formats; captions are plain text, not markup.
HARMLESS = str.maketrans({"{": "(", "}": ")", "<": "\u2039", ">": "\u203a", "\\": "/"})


def import_pysubs2() -> ModuleType:
    """Return the library for subtitle formats.

    Raises:
        InputError: It is not installed.
    """
    try:
        import pysubs2
    except ImportError as error:
        raise InputError(
            "Subtitles are written with pysubs2, which is not installed: pip install 'casa-engine[live]'."
        ) from error
    return pysubs2


def subtitles(records: list[FrameResult], end_s: float) -> pysubs2.SSAFile:
    """Return timed captions.

    Args:
        records: Frames in order.
        end_s: When the video ends, and the last caption at the latest.
    """
    pysubs2 = import_pysubs2()
    spoken = [record for record in records if record.caption]
    starts = [rounded_timestamp(record) for record in spoken]
    file = pysubs2.SSAFile()
    for record, start, following in zip(spoken, starts, [*starts, end_s][1:], strict=True):
        end = min(following, start + MAX_CAPTION_S)
        event = pysubs2.SSAEvent(start=pysubs2.make_time(s=start), end=pysubs2.make_time(s=end))
        event.plaintext = " ".join(record.caption.translate(HARMLESS).split())
        file.append(event)
    return file


def write_subtitles(file: pysubs2.SSAFile, path: Path) -> None:
    """Write SRT, WebVTT or ASS, by the suffix."""
    path.write_text(file.to_string(path.suffix[1:]), encoding="utf-8")


def styled(file: pysubs2.SSAFile, width: int, height: int) -> pysubs2.SSAFile:
    """Return the captions in the burned-in style: white on a dark box at the bottom, in proportion to the picture.

    Mutates:
        file: its style and size.
    """
    pysubs2 = import_pysubs2()
    file.info |= {"PlayResX": str(width), "PlayResY": str(height)}
    box = pysubs2.Color(0, 0, 0, 80)
    file.styles["Default"] = pysubs2.SSAStyle(
        fontname="DejaVu Sans",
        fontsize=max(12.0, height / 14),
        marginv=max(4, height // 40),
        borderstyle=3,
        outline=max(1.0, height / 200),
        shadow=0,
        outlinecolor=box,
        backcolor=box,
    )
    return file


def rounded_timestamp(record: FrameResult) -> float:
    """Return a frame's time as all files have it: what is far below a microsecond is the arithmetic's."""
    return round(record.timestamp, 6)


def line(record: FrameResult) -> dict[str, Any]:
    """Return a frame's fields in the JSON lines, by their names there."""
    return {
        "timestamp": rounded_timestamp(record),
        "caption": record.caption,
        "tokens": record.num_tokens,
        "ttft_ms": round(record.ttft_ms, 3),
        "delay_ms": round(record.delay_ms, 3),
        "text_tokens": record.text_tokens,
        "image_pages": record.image_pages,
    }


class JsonLines:
    """A file of one JSON line for each frame.

    Args:
        path: The file; replaced if it exists.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("w", encoding="utf-8")

    def write(self, record: FrameResult) -> None:
        """Append a frame and flush it."""
        self._file.write(json.dumps(line(record), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
