"""`casa-caption` with a function in the place of the model: everything else is real."""

from contextlib import asynccontextmanager

from casa_serving.caption import cli as caption_cli
from casa_serving.live.results import FrameResult


def frame_result(timestamp, caption) -> FrameResult:
    """Return the result of a frame of which the caption alone matters."""
    return FrameResult(timestamp, caption, 2, False, False, False, 0.0, 1.0, 2.0, 2.0, 3, 4, 1, 8192, 1024)


def scripted(monkeypatch, caption) -> None:
    """Put a function of the sample in the place of the model."""

    @asynccontextmanager
    async def open_scripted(*args):
        async def captioner(sample):
            return frame_result(sample.timestamp, caption(sample))

        yield captioner

    monkeypatch.setattr(caption_cli, "engine_captioner", open_scripted)
