"""`/v1/live` over a real socket with an engine that follows a script, so that a test decides when a frame is done."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from casa_engine.errors import InputError
from casa_engine.live import LiveSettings
from casa_serving.endpoint.media import GuardedImageIO
from casa_serving.live.connection import LiveService
from casa_serving.live.endpoint import live
from casa_serving.live.metrics import LiveMetrics
from casa_serving.live.protocol import PATH
from casa_serving.live.results import AnswerResult, FrameResult, TextDelta
from casa_serving.live.session_slots import SessionSlots
from casa_serving.options.image_limits import ImageLimits
from casa_serving.options.live_options import LiveOptions


class ScriptedEngine:
    """Says each frame's size in two words; `gate` holds every frame until it is open."""

    model_name = "scripted"

    def __init__(self):
        self.defaults = LiveSettings(text_budget=512)
        self.gate = asyncio.Event()
        self.gate.set()
        self.sessions, self.histories = [], []
        self.num_in_work = 0
        self.places = 512_000

    def capacity(self, settings):
        return self.places // settings.text_budget

    async def open(self, settings, history=()):
        if "<bad>" in settings.instruction:
            raise InputError("the instruction holds a special token")
        self.sessions.append(ScriptedSession(self))
        self.histories.append(list(history))
        return self.sessions[-1]


@dataclass
class ScriptedSession:
    engine: ScriptedEngine
    is_closed: bool = False
    sizes: list = field(default_factory=list)

    async def caption(self, image, timestamp, arrived_s):
        started_s = time.monotonic()
        self.engine.num_in_work += 1
        try:
            self.sizes.append(image.size)
            yield TextDelta(f"{image.width} ")
            await self.engine.gate.wait()
            if image.width == 13:
                raise RuntimeError("the engine is dead")
            if image.width == 17:
                raise InputError("the image does not fit")
            yield TextDelta(f"{image.height}")
            ended_s = time.monotonic()
            yield FrameResult(
                timestamp=timestamp,
                caption=f"{image.width} {image.height}",
                num_tokens=3,
                truncated=False,
                trimmed=False,
                restarted=False,
                queue_ms=1000 * (started_s - arrived_s),
                ttft_ms=1.0,
                total_ms=2.0,
                delay_ms=1000 * (ended_s - arrived_s),
                text_tokens=40,
                image_tokens=4,
                image_pages=2,
                kv_bytes=8192,
                insertion_bytes=1024,
            )
        finally:
            self.engine.num_in_work -= 1

    async def ask(self, question):
        if "<bad>" in question:
            raise InputError("the question holds a special token")
        await self.engine.gate.wait()
        yield TextDelta("yes")
        yield AnswerResult("yes", 2, False, False, False, 1.0, 2.0, 50)

    async def close(self):
        self.is_closed = True


LABELS = {"model_name": "scripted", "engine": "0"}


@dataclass(frozen=True)
class ScriptedServer:
    url: str
    engine: ScriptedEngine
    slots: SessionSlots
    metrics: CollectorRegistry

    def metric(self, name, **labels):
        return self.metrics.get_sample_value(name, LABELS | labels)


@asynccontextmanager
async def scripted_server(**options) -> AsyncIterator[ScriptedServer]:
    """Serve the protocol in this very event loop; options are `LiveOptions`' without `live_`."""
    prometheus = CollectorRegistry()
    metrics = LiveMetrics(LABELS.values(), prometheus)
    chosen = LiveOptions(**{f"live_{name}": value for name, value in options.items()})
    slots = SessionSlots(chosen.live_max_sessions, metrics)
    engine = ScriptedEngine()
    app = FastAPI()
    app.add_api_websocket_route(PATH, live)
    app.state.live = LiveService(engine, chosen, slots, metrics, GuardedImageIO(ImageLimits()))
    server = app.state.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield ScriptedServer(f"ws://127.0.0.1:{port}{PATH}", engine, slots, prometheus)
    finally:
        engine.gate.set()
        server.should_exit = True
        await task
