"""Captions as files: SRT and WebVTT for players, ASS to be burned in, JSON lines for programs.

A caption is shown until the next one begins, at most `MAX_CAPTION_S`, and not beyond the video. Silent frames have no
entry in subtitles; in the JSON lines every frame has one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING

from casa_engine.errors import InputError

if TYPE_CHECKING:
    import pysubs2

MAX_CAPTION_S = 10.0
FORMATS = ("srt", "vtt", "jsonl")
# Replacements of characters with a meaning in one of the formats; captions are plain text, not markup.
HARMLESS = str.maketrans({"{": "(", "}": ")", "<": "\u2039", ">": "\u203a", "\\": "/"})


@dataclass(frozen=True)
class FrameRecord:
    """One frame and its caption.

    Attributes:
        timestamp: Seconds on the video's clock, as a player shows them.
        caption: "" if the model stayed silent.
        tokens: Generated tokens, the stop token included.
        ttft_ms: Milliseconds from sending the frame to the first token.
        delay_ms: Milliseconds to the last token.
        text_tokens: Text tokens of the session in the KV cache.
        image_pages: KV-cache pages of the frame.
    """

    timestamp: float
    caption: str
    tokens: int
    ttft_ms: float
    delay_ms: float
    text_tokens: int
    image_pages: int


def import_pysubs2() -> ModuleType:
    """Returns the library for subtitle formats.

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


def subtitles(records: list[FrameRecord], end_s: float) -> pysubs2.SSAFile:
    """Returns timed captions.

    Args:
        records: Frames in order.
        end_s: When the video ends, and the last caption at the latest.
    """
    pysubs2 = import_pysubs2()
    spoken = [record for record in records if record.caption]
    starts = [record.timestamp for record in spoken]
    file = pysubs2.SSAFile()
    for record, following in zip(spoken, [*starts, end_s][1:], strict=True):
        end = min(following, record.timestamp + MAX_CAPTION_S)
        event = pysubs2.SSAEvent(start=pysubs2.make_time(s=record.timestamp), end=pysubs2.make_time(s=end))
        event.plaintext = " ".join(record.caption.translate(HARMLESS).split())
        file.append(event)
    return file


def write_subtitles(file: pysubs2.SSAFile, path: Path) -> None:
    """Writes SRT, WebVTT or ASS, by the suffix."""
    path.write_text(file.to_string(path.suffix[1:]), encoding="utf-8")


def styled(file: pysubs2.SSAFile, width: int, height: int) -> pysubs2.SSAFile:
    """Returns the captions in the burned-in style: white on a dark box at the bottom, in proportion to the picture.

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


class JsonLines:
    """A file of one JSON line for each frame.

    Args:
        path: The file; replaced if it exists.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("w", encoding="utf-8")

    def write(self, record: FrameRecord) -> None:
        """Appends a frame and flushes it."""
        self._file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
