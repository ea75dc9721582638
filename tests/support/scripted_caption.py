"""`casa-caption` with a function in the place of the model: everything else is real."""

from contextlib import asynccontextmanager

from casa_serving.caption import cli as caption_cli
from casa_serving.caption.subtitles import FrameRecord


def scripted(monkeypatch, caption) -> None:
    """Puts a function of the sample in the place of the model."""

    @asynccontextmanager
    async def open_scripted(*args):
        async def captioner(sample):
            return FrameRecord(sample.timestamp, caption(sample), 2, 1.0, 2.0, 3, 1)

        yield captioner

    monkeypatch.setattr(caption_cli, "engine_captioner", open_scripted)
