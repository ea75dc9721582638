"""The files that `casa-caption` writes: built beside their places, and put there together at the end.

What was there before stays until then, and for good where captioning fails: what was captioned by then is then put
beside it, as PREFIX.partial.srt and so on.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from casa_serving.live.caption_options import chosen_formats, output_path
from casa_serving.live.subtitles import FrameRecord, JsonLines, subtitles, write_subtitles

if TYPE_CHECKING:
    from pysubs2 import SSAFile

JSONL = "jsonl"


@contextmanager
def building(options: argparse.Namespace) -> Iterator[Outputs]:
    """Opens a folder for the files beside their places, which is gone afterwards with whatever is left in it."""
    beside = output_path(options, JSONL).parent
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=beside, prefix=".casa-caption-")))
        outputs = Outputs(options, folder)
        stack.callback(outputs.close)
        yield outputs


class Outputs:
    """The files of one run.

    Args:
        options: The command line, which names them.
        folder: Where they are built.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._formats = chosen_formats(options)
        self._lines = JsonLines(self._built(JSONL)) if JSONL in self._formats else None

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
        for suffix in self._formats:
            if suffix != JSONL:
                write_subtitles(captions, self._built(suffix))
        places = {suffix: self._place(suffix, complete) for suffix in self._formats}
        for suffix, place in places.items():
            os.replace(self._built(suffix), place)
        if not self._options.quiet:
            print(f"{len(records)} frames, {len(captions)} captions: {', '.join(map(str, places.values()))}")
        return captions

    def _built(self, suffix: str) -> Path:
        return self._folder / f"captions.{suffix}"

    def _place(self, suffix: str, complete: bool) -> Path:
        path = output_path(self._options, suffix)
        if complete or not path.exists():
            return path
        return path.with_name(f"{path.name.removesuffix(f'.{suffix}')}.partial.{suffix}")
