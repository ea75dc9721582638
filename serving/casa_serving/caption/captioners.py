"""Two captioners, which caption frame by frame: an own engine, or a server's `/v1/live`."""

from __future__ import annotations

import math
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from io import BytesIO
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Resampling
from yarl import URL

from casa_engine.errors import InputError
from casa_engine.live import LiveSettings
from casa_engine.originals.views import resolve_checkpoint
from casa_serving.caption.video import Sample
from casa_serving.live.results import FrameResult

if TYPE_CHECKING:
    from PIL import Image

    from casa_serving.live.client import LiveClient
    from casa_serving.live.protocol import Limits
    from casa_serving.live.session import LiveSession

Captioner = Callable[[Sample], Awaitable[FrameResult]]
JPEG_QUALITY = 95


@asynccontextmanager
async def engine_captioner(checkpoint: Path, settings: LiveSettings) -> AsyncIterator[Captioner]:
    """Open a session in its own engine, which is shut down with the session."""
    from casa_serving.engine_defaults import runs_on_cpu
    from casa_serving.live.session import LiveEngine, start_engine

    with block_sigint_in_children():
        # Compiling for the CPU takes longer than captioning most videos.
        checkpoint = resolve_checkpoint(checkpoint)
        engine = await start_engine(checkpoint, enforce_eager=runs_on_cpu())
    try:
        session = await LiveEngine(engine, checkpoint).open(settings)
        try:
            yield lambda sample: caption_in_engine(session, sample)
        finally:
            await session.close()
    finally:
        engine.shutdown()


@contextmanager
def block_sigint_in_children() -> Iterator[None]:
    """Block Ctrl-C in processes started within the body; a terminal sends it to all processes of a command.

    It would kill them before the session is closed. In this process it is delivered after the body.
    """
    # Where it is started later, it lifts the block itself.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def caption_in_engine(session: LiveSession, sample: Sample) -> FrameResult:
    """Caption one frame in a session; return when the caption is complete."""
    async for item in session.caption(sample.image, sample.timestamp):
        if isinstance(item, FrameResult):
            return item
    raise RuntimeError("The session gave no result for a frame.")


@asynccontextmanager
async def server_captioner(server: str, api_key: str | None, settings: dict[str, Any]) -> AsyncIterator[Captioner]:
    """Open a session at a running server.

    Args:
        server: Its address, see `live_url`.
        api_key: Its key, if it has one.
        settings: What differs from the server's own settings.

    Raises:
        InputError: There is no such server, or it has no live sessions.
        LiveError: It rejects the session, or a frame.
    """
    try:
        from websockets.exceptions import WebSocketException

        from casa_serving.live.client import LiveClient
    except ImportError as error:
        raise InputError("--server needs the websockets library: pip install 'casa-engine[live]'.") from error
    try:
        async with LiveClient(live_url(server), api_key=api_key) as client:
            await client.create(**settings)
            yield lambda sample: caption_by_server(client, sample)
            await client.stop()
    except (OSError, WebSocketException) as error:
        raise InputError(f"The server {server!r} cannot be used: {error}") from error


async def caption_by_server(client: LiveClient, sample: Sample) -> FrameResult:
    """Send one frame and wait until its caption is complete."""
    from casa_serving.live.protocol import ErrorEvent, FrameDone, LiveError

    limits = client.created.limits if client.created else None
    file = encode(sample.image, None) if limits is None else fit(sample.image, limits)
    number = await client.send_frame(file, sample.timestamp)
    async for event in client.events():
        if isinstance(event, ErrorEvent):
            raise LiveError(event.code, event.message)
        if isinstance(event, FrameDone) and event.frame == number:
            return event.result
    raise InputError("The server closed the session before the video's end.")


def fit(image: Image.Image, limits: Limits) -> bytes:
    """Return a frame as a file, scaled down to the server's limits, which are above the model's resolution."""
    scale = min(1.0, math.sqrt(limits.max_frame_pixels / (image.width * image.height)))
    scale = min(scale, limits.max_frame_side / max(image.size))
    return encode(image if scale == 1 else scaled(image, scale), limits.max_frame_bytes)


def encode(image: Image.Image, max_bytes: int | None) -> bytes:
    """Return a frame as a file: lossless if that is small enough, and scaled down if necessary."""
    file = saved(image, "PNG", compress_level=1)
    while max_bytes is not None and len(file) > max_bytes:
        file = saved(image, "JPEG", quality=JPEG_QUALITY)
        if max(image.size) == 1:
            break
        image = scaled(image, 0.5)
    return file


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an image as a file of the format `kind`."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scaled(image: Image.Image, scale: float) -> Image.Image:
    """Return a smaller copy."""
    size = [max(1, int(side * scale)) for side in image.size]
    return image.resize(tuple(size), Resampling.LANCZOS, reducing_gap=3.0)


def live_url(server: str) -> str:
    """Return the URL of a server's WebSocket, from any of its addresses.

    Raises:
        InputError: It is no valid address.
    """
    from casa_serving.live.protocol import PATH

    try:
        url = URL(server)
    except ValueError as error:
        raise InputError(f"--server {server!r} is not an address. Expected http://host:port.") from error
    schemes = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
    if url.scheme not in schemes or not url.host:
        raise InputError(f"--server is {server!r}. Expected http(s)://host:port or ws(s)://host:port.")
    path = url.path if url.path not in ("", "/") else PATH
    return str(url.with_path(path).with_scheme(schemes[url.scheme]))
