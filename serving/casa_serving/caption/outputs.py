"""The files that `casa-caption` writes: built beside their places, and put there together at the end.

What was there before stays until then, and for good where captioning fails: what was captioned by then is then put
beside it, as PREFIX.partial.srt and so on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from casa_engine.atomic_files import publish, staged_beside
from casa_serving.caption.burn import burn
from casa_serving.caption.options import chosen_formats, output_path
from casa_serving.caption.subtitles import FrameRecord, JsonLines, subtitles, write_subtitles

if TYPE_CHECKING:
    from pysubs2 import SSAFile

    from casa_serving.caption.video import VideoInfo

JSONL = "jsonl"


@contextmanager
def building(options: argparse.Namespace) -> Iterator[Outputs]:
    """Makes the files beside their places; those that are not published are gone afterwards.

    Raises:
        OSError: They cannot be written there.
    """
    with ExitStack() as stack:
        parts = {
            suffix: stack.enter_context(staged_beside(output_path(options, suffix)))
            for suffix in chosen_formats(options)
        }
        burned = stack.enter_context(staged_beside(options.burn)) if options.burn is not None else None
        outputs = Outputs(options, parts, burned)
        stack.callback(outputs.close)
        yield outputs


class Outputs:
    """The files of one run.

    Args:
        options: The command line, which names them.
        parts: Where the files of captions are built, by suffix.
        burned: Where the copy with captions in it is built, if it is wanted.
    """

    def __init__(self, options: argparse.Namespace, parts: dict[str, Path], burned: Path | None) -> None:
        self._options, self._parts, self._burned = options, parts, burned
        self._lines = JsonLines(parts[JSONL]) if JSONL in parts else None

    def write(self, record: FrameRecord) -> None:
        """Appends a frame to the JSON lines, if they are wanted."""
        if self._lines is not None:
            self._lines.write(record)

    def close(self) -> None:
        """Closes what grows."""
        if self._lines is not None:
            self._lines.close()

    def publish(self, records: list[FrameRecord], *, complete: bool) -> SSAFile:
        """Puts all files in their places; returns the captions.

        Args:
            records: All frames, at least one.
            complete: Whether captioning came to its end: nothing else replaces what is there.
        """
        captions = subtitles(records, end_s=records[-1].timestamp + 1 / self._options.fps)
        self.close()
        for suffix, part in self._parts.items():
            if suffix != JSONL:
                write_subtitles(captions, part)
        places = {part: self._place(suffix, complete) for suffix, part in self._parts.items()}
        publish(places)
        if not self._options.quiet:
            print(f"{len(records)} frames, {len(captions)} captions: {', '.join(map(str, places.values()))}")
        return captions

    def publish_burned(self, info: VideoInfo, captions: SSAFile) -> None:
        """Burns the captions into a copy of the video, if it is wanted, and puts it in its place.

        Mutates:
            captions: their times and styles.

        Raises:
            InputError: ffmpeg cannot do it.
        """
        if self._burned is not None:
            burn(info, captions, self._burned)
            publish({self._burned: self._options.burn})

    def _place(self, suffix: str, complete: bool) -> Path:
        path = output_path(self._options, suffix)
        if complete or not path.exists():
            return path
        return path.with_name(f"{path.name.removesuffix(f'.{suffix}')}.partial.{suffix}")
