"""Burns captions into a copy of a video, with the ffmpeg command."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from casa_engine.errors import InputError
from casa_serving.caption.subtitles import styled, write_subtitles
from casa_serving.caption.video import OPEN_OPTIONS, VideoInfo, upright_size

if TYPE_CHECKING:
    import pysubs2

SUFFIXES = (".mp4", ".mkv", ".mov", ".webm")
# Without a font libass draws nothing, and ffmpeg still succeeds.
NO_FONT = "failed to find any fallback"
MAX_MESSAGE_CHARACTERS = 300


def find_ffmpeg() -> str:
    """Return the ffmpeg of the PATH, or else the one in the package imageio-ffmpeg.

    Raises:
        InputError: Neither is installed.
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


def burn(info: VideoInfo, captions: pysubs2.SSAFile, output: Path) -> None:
    """Write a copy of a video with its sound and the captions in the picture.

    Args:
        info: The video.
        captions: Timed from the beginning of playback.
        output: The file to write; incomplete while ffmpeg runs, and if it fails.

    Mutates:
        captions: their times and styles.

    Raises:
        InputError: ffmpeg fails.
    """
    ffmpeg = find_ffmpeg()
    with tempfile.TemporaryDirectory(prefix="casa-caption-") as folder:
        # A filter's argument has its own quoting rules: a plain name in the working folder needs none.
        # ffmpeg's clock begins with the first picture or sound.
        captions.shift(s=info.zero_s - info.start_s)
        write_subtitles(styled(captions, *upright_size(info.path)), Path(folder) / "captions.ass")
        run = subprocess.run(
            command(ffmpeg, info, output.absolute()),
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    check(run, has_captions=bool(captions))


def command(ffmpeg: str, info: VideoInfo, output: Path) -> list[str]:
    """Return the ffmpeg command: it opens only real containers, keeps all sound, and its result plays in browsers."""
    guards = [word for name, value in OPEN_OPTIONS.items() for word in (f"-{name}", value)]
    # Text is drawn on square pixels; 4:2:0 requires even sides.
    square = "scale=max(iw\\,iw*sar):max(ih\\,ih/sar),setsar=1"
    filters = f"{square},ass=captions.ass,pad=ceil(iw/2)*2:ceil(ih/2)*2"
    words = [ffmpeg, "-hide_banner", "-loglevel", "warning", "-nostdin", "-y", *guards, "-i", str(info.path.absolute())]
    words += ["-map", f"0:{info.stream}", "-map", "0:a?", "-vf", filters, "-pix_fmt", "yuv420p"]
    if output.suffix in (".mp4", ".mov"):
        words += ["-movflags", "+faststart"]
    return [*words, str(output)]


def check(run: subprocess.CompletedProcess[str], *, has_captions: bool) -> None:
    """Raise InputError if ffmpeg failed, or found no font."""
    if run.returncode:
        last = run.stderr.strip()[-MAX_MESSAGE_CHARACTERS:] or "no reason given"
        raise InputError(f"ffmpeg could not burn the captions in (status {run.returncode}): {last}")
    if has_captions and NO_FONT in run.stderr:
        raise InputError("ffmpeg found no font to burn the captions in with: install one, for example DejaVu Sans.")
