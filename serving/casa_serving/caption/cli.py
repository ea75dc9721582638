"""`casa-caption VIDEO`: captions a video file, a URL or a camera, and writes subtitles.

    source (file, download, camera)  ->  samples  ->  captioner (engine or server)  ->  records  ->  files

Ctrl-C stops it early: the files written so far are complete.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from casa_engine.command import sigterm_as_interrupt
from casa_engine.digits import checkpoint_path
from casa_engine.errors import CasaError
from casa_engine.live import LiveSettings
from casa_serving.caption.burn import find_ffmpeg
from casa_serving.caption.camera import Camera, is_camera
from casa_serving.caption.captioners import Captioner, engine_captioner, server_captioner
from casa_serving.caption.options import (
    build_parser,
    check_options,
    given_settings,
    is_url,
)
from casa_serving.caption.outputs import Outputs, building
from casa_serving.caption.subtitles import import_pysubs2
from casa_serving.caption.video import Sample, VideoInfo, check_complete, sample, scan
from casa_serving.exit_status import INTERRUPTED
from casa_serving.live.results import FrameResult


@dataclass(frozen=True)
class Source:
    """The source of the frames.

    Attributes:
        samples: Frames in order; read lazily.
        total: Their number, if it is known.
        info: Properties of the file, if it is one.
    """

    samples: Iterator[Sample]
    total: int | None
    info: VideoInfo | None


@contextmanager
def open_source(options: argparse.Namespace) -> Iterator[Source]:
    """Open the source that the command line names; a download is removed afterwards.

    Raises:
        InputError: It cannot be opened, or is no video.
    """
    with ExitStack() as stack:
        if is_camera(options.video):
            camera = stack.enter_context(Camera(options.video))
            yield Source(camera.samples(options.fps, options.max_seconds), None, None)
            return
        path = Path(options.video)
        if is_url(options.video):
            path = asyncio.run(fetch(options, Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        info = scan(path)
        check_complete(info, options.max_seconds)
        total = info.num_samples(options.fps, options.max_seconds)
        samples = sample(info, options.fps, options.max_seconds)
        yield Source((replace(item, timestamp=item.timestamp + info.late_s) for item in samples), total, info)


async def fetch(options: argparse.Namespace, folder: Path) -> Path:
    """Download the video that the command line names."""
    from casa_serving.caption.download import download  # Slow: imports vLLM.

    return await download(
        options.video,
        options.allowed_media_domains,
        folder,
        max_bytes=options.max_download_bytes,
        allow_loopback=options.allow_loopback_media,
    )


def open_captioner(options: argparse.Namespace) -> AbstractAsyncContextManager[Captioner]:
    """Return the captioner, of an engine or a server; nothing is started yet.

    Raises:
        CasaError: Checkpoint or settings are invalid.
    """
    if options.server is not None:
        return server_captioner(options.server, options.api_key, given_settings(options))
    checkpoint = options.checkpoint or checkpoint_path()
    return engine_captioner(checkpoint, LiveSettings.for_checkpoint(checkpoint, **given_settings(options)))


async def caption_all(
    records: list[FrameResult],
    source: Source,
    captioner: AbstractAsyncContextManager[Captioner],
    outputs: Outputs,
    options: argparse.Namespace,
) -> bool:
    """Caption frame by frame until the end or Ctrl-C; return whether it reached the end.

    Mutates:
        records: Each frame is appended.
    """
    job = asyncio.create_task(caption_into(records, source, captioner, outputs, options))
    interrupted = asyncio.Event()

    def interrupt() -> None:
        interrupted.set()
        job.cancel()

    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, interrupt)
    try:
        await asyncio.wait([job])
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            # The event loop has set the default, with which SIGTERM exits immediately.
            signal.signal(number, handler)
    # After an interrupt, errors of the clean-up are ignored.
    if not interrupted.is_set():
        job.result()
    return not interrupted.is_set()


async def caption_into(
    records: list[FrameResult],
    source: Source,
    captioner: AbstractAsyncContextManager[Captioner],
    outputs: Outputs,
    options: argparse.Namespace,
) -> None:
    """Start the captioner and caption all frames.

    Mutates:
        records: Each frame is appended.
    """
    async with captioner as caption:
        with tqdm(total=source.total, unit="frame", disable=options.quiet) as progress:
            while (frame := await asyncio.to_thread(next, source.samples, None)) is not None:
                records.append(await caption(frame))
                outputs.write(records[-1])
                report(progress, records[-1])


def report(progress: tqdm, record: FrameResult) -> None:
    """Show a caption above the progress bar."""
    if record.caption and not progress.disable:
        progress.write(f"{record.timestamp:9.2f} s  {record.caption}")
    progress.update()


def run(options: argparse.Namespace) -> int:
    """Run the command line; return the exit status."""
    check_options(options)
    import_pysubs2()
    if options.burn is not None:
        find_ffmpeg()
    captioner = open_captioner(options)
    with sigterm_as_interrupt(), open_source(options) as source, building(options) as outputs:
        records: list[FrameResult] = []
        complete, captions = False, None
        try:
            complete = asyncio.run(caption_all(records, source, captioner, outputs, options))
        finally:
            if records:
                captions = outputs.publish(records, complete=complete)
        if source.info is not None and captions is not None and complete:
            outputs.publish_burned(source.info, captions)
    return 0 if complete else INTERRUPTED


def main(arguments: list[str] | None = None, program: str = "casa-caption") -> int:
    """Run the command; return the exit status. `program` is its name in messages."""
    options = build_parser(program).parse_args(arguments)
    # vLLM reads it at import; keeps its log off the terminal, which shows captions.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        return run(options)
    except (CasaError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
