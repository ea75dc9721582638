"""The files that `casa-caption` writes: written to temporary files and moved to their paths together at the end.

Older files stay until then, and also if captioning fails: the captions so far are then written beside them, as
PREFIX.partial.srt and so on.
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
from casa_serving.caption.subtitles import JsonLines, subtitles, write_subtitles
from casa_serving.live.results import FrameResult

if TYPE_CHECKING:
    from pysubs2 import SSAFile

    from casa_serving.caption.video import VideoInfo

JSONL = "jsonl"


@contextmanager
def building(options: argparse.Namespace) -> Iterator[Outputs]:
    """Create the temporary files; those that are not published are removed afterwards.

    Raises:
        OSError: They cannot be written.
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
        parts: Temporary caption files, by suffix.
        burned: Temporary copy of the video with captions, if requested.
    """

    def __init__(self, options: argparse.Namespace, parts: dict[str, Path], burned: Path | None) -> None:
        self._options, self._parts, self._burned = options, parts, burned
        self._lines = JsonLines(parts[JSONL]) if JSONL in parts else None

    def write(self, record: FrameResult) -> None:
        """Append a frame to the JSON lines, if requested."""
        if self._lines is not None:
            self._lines.write(record)

    def close(self) -> None:
        """Close the JSON lines."""
        if self._lines is not None:
            self._lines.close()

    def publish(self, records: list[FrameResult], *, complete: bool) -> SSAFile:
        """Move all files to their final paths; return the captions.

        Args:
            records: All frames, at least one.
            complete: Whether captioning reached the end: only then older files are replaced.
        """
        captions = subtitles(records, end_s=records[-1].timestamp + 1 / self._options.fps)
        self.close()
        for suffix, part in self._parts.items():
            if suffix != JSONL:
                write_subtitles(captions, part)
        places = {part: self._final_path(suffix, complete) for suffix, part in self._parts.items()}
        publish(places)
        if not self._options.quiet:
            print(f"{len(records)} frames, {len(captions)} captions: {', '.join(map(str, places.values()))}")
        return captions

    def publish_burned(self, info: VideoInfo, captions: SSAFile) -> None:
        """Burn the captions into a copy of the video, if requested, and move it to its final path.

        Mutates:
            captions: Their times and styles.

        Raises:
            InputError: ffmpeg fails.
        """
        if self._burned is not None:
            burn(info, captions, self._burned)
            publish({self._burned: self._options.burn})

    def _final_path(self, suffix: str, complete: bool) -> Path:
        path = output_path(self._options, suffix)
        if complete or not path.exists():
            return path
        return path.with_name(f"{path.name.removesuffix(f'.{suffix}')}.partial.{suffix}")
