"""The command line of `casa-caption`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from casa_engine.errors import InputError
from casa_engine.live import LiveSettings
from casa_serving.caption.burn import SUFFIXES
from casa_serving.caption.camera import is_camera
from casa_serving.caption.subtitles import FORMATS

DESCRIPTION = """Captions a video as if it were live: a frame every half second, a few words where something happens.
VIDEO is a file, a URL of an allowed domain, or a camera such as /dev/video0. Every frame of a file is looked at; of a
camera always the newest one."""
MAX_DOWNLOAD_BYTES = 2_000_000_000
# Help of the options for session settings; the rest of each option follows from the setting's field.
SETTINGS_HELP = {
    "instruction": "what the model is told",
    "system": "system prompt",
    "prompt": "the first caption begins with this",
    "max_frame_tokens": "most tokens a frame",
    "temperature": "0: always the likeliest token",
    "top_k": "how many tokens to choose from; 0: all",
    "seed": "makes sampling repeatable",
    "repetition_penalty": "above 1: what was said lately is said less; 1: off",
    "penalty_decay": "how much of it still counts a token later",
    "penalty_clamp": "most occurrences that count",
    "stop_bias": "below 1: speaks more readily; 1: off",
    "ngram_size": "no sequence of so many tokens twice; 0: off",
    "ngram_window": "within so many tokens",
    "text_budget": "most text tokens kept; the oldest captions leave",
}
SETTINGS_TYPES = {str: str, str | None: str, int: int, int | None: int, float: float}


def build_parser(program: str = "casa-caption") -> argparse.ArgumentParser:
    """Return the parser; `program` is the command's name in messages."""
    parser = argparse.ArgumentParser(prog=program, description=DESCRIPTION)
    parser.add_argument("video", metavar="VIDEO", help="file, URL, or camera device")
    model = parser.add_argument_group("model").add_mutually_exclusive_group()
    model.add_argument("--checkpoint", type=Path, help="folder of the model (default: the one in the package)")
    model.add_argument("--server", metavar="URL", help="ask a running casa-serve, http://host:port, instead")
    parser.add_argument("--api-key", help="the server's key")
    parser.add_argument("--fps", type=float, default=LiveSettings.fps, help="frames looked at a second (%(default)g)")
    parser.add_argument("--max-seconds", type=float, help="only the first so many seconds of the video")
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="PREFIX", help="files are PREFIX.srt ... (default: the video's name)")
    output.add_argument("--formats", default=",".join(FORMATS), help="any of %(default)s")
    output.add_argument("--burn", type=Path, metavar="OUT.mp4", help="also write the video with the captions in it")
    output.add_argument("--quiet", action="store_true", help="no progress and no captions on the terminal")
    urls = parser.add_argument_group("URLs")
    urls.add_argument("--allowed-media-domains", nargs="+", default=[], metavar="HOST", help="hosts to download from")
    urls.add_argument("--allow-loopback-media", action="store_true", help="also from this machine (for tests)")
    urls.add_argument("--max-download-bytes", type=int, default=MAX_DOWNLOAD_BYTES, help="(%(default)s)")
    settings = parser.add_argument_group(
        "session", "Defaults: those of the checkpoint, else of the published captioner"
    )
    types = {field.name: field.type for field in fields(LiveSettings)}
    for name, words in SETTINGS_HELP.items():
        option = f"--{name.replace('_', '-')}"
        settings.add_argument(option, type=SETTINGS_TYPES[types[name]], default=argparse.SUPPRESS, help=words)
    return parser


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the session's settings that the command line sets."""
    given = {name: value for name, value in vars(options).items() if name in SETTINGS_HELP}
    return {"fps": options.fps, **given}


def check_options(options: argparse.Namespace) -> None:
    """Check the options before anything is read, downloaded or started.

    Raises:
        InputError: Names the invalid option.
    """
    LiveSettings.from_fields(given_settings(options))
    chosen_formats(options)
    if options.max_seconds is not None and not options.max_seconds > 0:
        raise InputError(f"--max-seconds is {options.max_seconds:g}; expected more than 0.")
    if options.max_download_bytes < 1:
        raise InputError(f"--max-download-bytes is {options.max_download_bytes}; expected at least 1.")
    if options.burn is not None:
        check_burn(options)
    outputs = [output_path(options, suffix) for suffix in chosen_formats(options)]
    for path in [*outputs, *([options.burn] if options.burn else [])]:
        if not path.parent.is_dir():
            raise InputError(f"The folder {str(path.parent)!r} does not exist. Make it, or name another.")
        if path.is_dir():
            raise InputError(f"{str(path)!r}, which is to be written, is a folder. Name another file with --output.")
        if path.exists() and Path(options.video).exists() and path.samefile(options.video):
            raise InputError(f"{str(path)!r}, which is to be written, is the video itself. Name another with --output.")


def check_burn(options: argparse.Namespace) -> None:
    """Raise InputError if captions cannot be burned into the video or the output."""
    if is_camera(options.video):
        raise InputError("--burn needs a file or a URL: what a camera shows is not kept.")
    if options.burn.suffix not in SUFFIXES:
        raise InputError(f"--burn ends in {options.burn.suffix!r}; expected one of {', '.join(SUFFIXES)}.")
    if options.burn.exists() and Path(options.video).exists() and options.burn.samefile(options.video):
        raise InputError("--burn names the video itself; name another file.")


def chosen_formats(options: argparse.Namespace) -> list[str]:
    """Return the formats of the files to write."""
    formats = [word.strip() for word in options.formats.split(",") if word.strip()]
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise InputError(f"--formats is {options.formats!r}; expected some of {', '.join(FORMATS)}.")
    return formats


def is_url(text: str) -> bool:
    """Return whether a source is a URL rather than a file."""
    return "://" in text


def output_path(options: argparse.Namespace, suffix: str) -> Path:
    """Return the path of a caption file: PREFIX.suffix, by default beside the video, or in the current folder."""
    if options.output is not None:
        return Path(f"{options.output}.{suffix}")
    if is_camera(options.video):
        return Path(f"camera.{suffix}")
    if is_url(options.video):
        name = Path(options.video.partition("?")[0].rstrip("/")).stem
        return Path(f"{name or 'video'}.{suffix}")
    video = Path(options.video)
    return video.parent / f"{video.stem}.{suffix}"
