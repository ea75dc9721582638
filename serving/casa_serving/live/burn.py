"""Burns captions into a copy of a video, with the ffmpeg command."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from casa_engine.errors import InputError
from casa_serving.live.subtitles import styled, write_subtitles
from casa_serving.live.video import OPEN_OPTIONS, upright_size

if TYPE_CHECKING:
    import pysubs2

SUFFIXES = (".mp4", ".mkv", ".mov", ".webm")
# libass draws nothing where it finds no font, and ffmpeg calls that a success.
NO_FONT = "failed to find any fallback"
MAX_MESSAGE_CHARACTERS = 300


def find_ffmpeg() -> str:
    """The ffmpeg of the PATH, or else the one in the package imageio-ffmpeg.

    Raises:
        InputError: neither is there.
    """
    found = shutil.which("ffmpeg")
    if found is not None:
        return found
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise InputError(
            "--burn needs ffmpeg, and there is none: install ffmpeg, or pip install 'casa-engine[live]'."
        ) from error


def burn(video: Path, captions: pysubs2.SSAFile, output: Path) -> None:
    """Writes a copy of `video` with its sound and the captions in the picture; it is there whole or not at all.

    Raises:
        InputError: ffmpeg cannot do it.
    """
    ffmpeg = find_ffmpeg()
    part = output.with_name(f"{output.stem}.part{output.suffix}")
    with tempfile.TemporaryDirectory() as folder:
        # A filter's argument has rules of quoting of its own: a plain name in the working folder needs none.
        write_subtitles(styled(captions, *upright_size(video)), Path(folder) / "captions.ass")
        try:
            run = subprocess.run(
                command(ffmpeg, video.absolute(), part.absolute()),
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
            check(run, has_captions=bool(captions))
            os.replace(part, output)
        finally:
            part.unlink(missing_ok=True)


def command(ffmpeg: str, video: Path, output: Path) -> list[str]:
    """The call of ffmpeg: only real containers are opened, all sound is kept, browsers can play the result."""
    guards = [word for name, value in OPEN_OPTIONS.items() for word in (f"-{name}", value)]
    # 4:2:0 wants even sides.
    filters = "ass=captions.ass,pad=ceil(iw/2)*2:ceil(ih/2)*2"
    words = [ffmpeg, "-hide_banner", "-loglevel", "warning", "-nostdin", "-y", *guards, "-i", str(video)]
    words += ["-map", "0:v:0", "-map", "0:a?", "-vf", filters, "-pix_fmt", "yuv420p"]
    if output.suffix in (".mp4", ".mov"):
        words += ["-movflags", "+faststart"]
    return [*words, str(output)]


def check(run: subprocess.CompletedProcess[str], *, has_captions: bool) -> None:
    """Refuses what ffmpeg did not do, or did without letters."""
    if run.returncode:
        last = run.stderr.strip()[-MAX_MESSAGE_CHARACTERS:] or "no reason given"
        raise InputError(f"ffmpeg could not burn the captions in (status {run.returncode}): {last}")
    if has_captions and NO_FONT in run.stderr:
        raise InputError("ffmpeg found no font to burn the captions in with: install one, for example DejaVu Sans.")
