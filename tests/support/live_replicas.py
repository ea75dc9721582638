"""Replicas and an ingress for live sessions in one event loop, without Ray: real sockets, a scripted engine."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from casa_serving.cluster.live.proxy import LiveProxy
from casa_serving.cluster.live.replica_server import LiveServer
from casa_serving.endpoint.media import GuardedImageIO
from casa_serving.live.connection import LiveService
from casa_serving.live.metrics import LiveMetrics
from casa_serving.live.protocol import PATH
from casa_serving.live.session_slots import SessionSlots
from casa_serving.options.image_limits import ImageLimits
from casa_serving.options.live_options import LiveOptions
from scripted_live import ScriptedEngine


@dataclass(eq=False)
class Replica:
    """A replica's live server, and what the router has told about it."""

    name: str
    engine: ScriptedEngine
    server: LiveServer
    replica_shutdowns: list = field(default_factory=list)

    def leave(self):
        """Do what Ray does to a replica that is to stop: routers hear of it, each from a thread of its own."""
        for replica_shutdown in self.replica_shutdowns:
            replica_shutdown.notify()

    def die(self):
        """Do what SIGKILL does to its sockets."""
        for server in self.server._server.servers:
            server.close()
        for connection in list(self.server._server.server_state.connections):
            connection.transport.abort()


async def start_replica(name, **options):
    chosen = LiveOptions(**{f"live_{key}": value for key, value in options.items()})
    metrics = LiveMetrics(["scripted", "0"], CollectorRegistry())
    engine = ScriptedEngine()
    slots = SessionSlots(chosen.live_max_sessions, metrics)
    server = LiveServer(LiveService(engine, chosen, slots, metrics, GuardedImageIO(ImageLimits())))
    await server.start("127.0.0.1")
    return Replica(name, engine, server)


class Ingress:
    """Routes to the first replica that is not to be avoided, as Ray's router would to the least loaded."""

    def __init__(self, replicas):
        self.replicas, self.proxy = replicas, LiveProxy()
        self.asked, self.sessions = [], 0
        self.url = ""

    async def ask(self, context):
        replica = next((each for each in self.replicas if each.name not in context.avoid), self.replicas[0])
        self.asked.append(replica.name)
        context.replica = replica.name
        replica.replica_shutdowns.append(context.replica_shutdown)
        async for answer in replica.server.reserve_session():
            yield answer

    async def live(self, websocket):
        self.sessions += 1
        try:
            await self.proxy.serve(websocket, self.ask)
        finally:
            self.sessions -= 1


@asynccontextmanager
async def ingress_over(*names, **options):
    """Run replicas of these names behind an ingress; options are `LiveOptions`' without `live_`."""
    async with AsyncExitStack() as running:
        replicas = []
        for name in names:
            replicas.append(await start_replica(name, **options))
            running.push_async_callback(replicas[-1].server.stop)
            running.callback(replicas[-1].engine.gate.set)
        ingress = Ingress(replicas)
        app = Starlette(routes=[WebSocketRoute(PATH, ingress.live)])
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        ingress.url = f"ws://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}{PATH}"
        try:
            yield ingress
        finally:
            server.should_exit = True
            await task
