"""Live sessions on a replica: a small WebSocket server inside the replica's process, beside its engine client.

    ingress -- handle call `live` -->  reserve_session()   a slot and a token; open as long as the session lives
            -- WebSocket, token  -->  /v1/live            casa-serve's own connection code
            -- POST, drain token -->  /drain              every session gets `session.closed`, then ends

A client's frames cannot come through Ray's handle calls: those are not ordered, and each would count as one of the
replica's requests. The one call that stays open is what Ray counts, for load and for draining.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field

import uvicorn
from prometheus_client import Counter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from casa_serving.cluster.live.session_ticket import TOKEN_HEADER, SessionRejection, SessionTicket
from casa_serving.drain.connections import abort_connection
from casa_serving.live.connection import Connection, LiveService
from casa_serving.live.metrics import LiveMetrics
from casa_serving.live.protocol import PATH, POLICY

LOGGER = logging.getLogger("ray.serve")
DRAIN_PATH = "/drain"
CONNECT_TIMEOUT_S = 10.0
DRAIN_TIMEOUT_S = 5.0
WINDOW_S = 10.0


class EmbeddedUvicornServer(uvicorn.Server):
    """uvicorn inside Ray's process, whose signal handlers it must not replace."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers."""
        yield


@dataclass
class SessionReservation:
    """A reserved slot.

    Attributes:
        begun: Set when the WebSocket has connected.
        ended: Set when it has closed and its session is freed.
        websocket: The open WebSocket, or None.
    """

    begun: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    websocket: WebSocket | None = None


class LiveServer:
    """The live sessions of one replica; `start` makes it listen.

    Args:
        service: Shared by its sessions.
    """

    def __init__(self, service: LiveService) -> None:
        self._service = service
        self._reservations: dict[str, SessionReservation] = {}
        self._drain_token = secrets.token_urlsafe(32)
        self.frames = FrameWindow(service.metrics)
        routes = [WebSocketRoute(PATH, self._live), Route(DRAIN_PATH, self._drain, methods=["POST"])]
        app = Starlette(routes=routes)
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            ws_max_size=service.options.max_message_bytes,
            # Frames are compressed images already.
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=1,
        )
        # `abort_connection` finds connections there.
        self._server = app.state.server = EmbeddedUvicornServer(config)

    @property
    def num_sessions(self) -> int:
        """Number of reserved slots, and of open calls of `reserve_session`."""
        return len(self._reservations)

    async def start(self, host: str) -> None:
        """Listen on a free port.

        Args:
            host: This node's address in the cluster.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((host, 0))
        name = f"[{host}]" if family == socket.AF_INET6 else host
        self._address = f"{name}:{listener.getsockname()[1]}"
        self._task = asyncio.create_task(self._server.serve([listener]))
        while not self._server.started:
            await asyncio.sleep(0.01)
            if self._task.done():
                await self._task
                raise RuntimeError(f"The server of live sessions on {self._address} ended at its start.")

    async def stop(self) -> None:
        """Close all sessions and stop listening."""
        await self._service.slots.close(DRAIN_TIMEOUT_S)
        self._server.should_exit = True
        await self._task

    async def reserve_session(self) -> AsyncGenerator[SessionTicket | SessionRejection, None]:
        """Reserve a slot until its session ends, or does not connect in time.

        Yields:
            One item: the ticket, or the reason for the rejection. After a ticket the generator ends with the session;
            closing it before ends the session.
        """
        if self._service.slots.closing.is_set():
            yield SessionRejection("this replica is leaving")
            return
        most = self._service.options.live_max_sessions
        if len(self._reservations) >= most:
            yield SessionRejection(f"all {most} places of this replica are taken")
            return
        token = secrets.token_urlsafe(32)
        reservation = self._reservations[token] = SessionReservation()
        try:
            yield SessionTicket(
                url=f"ws://{self._address}{PATH}",
                token=token,
                drain_url=f"http://{self._address}{DRAIN_PATH}",
                drain_token=self._drain_token,
            )
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await reservation.begun.wait()
            await reservation.ended.wait()
        except TimeoutError:
            LOGGER.warning("Live session: its WebSocket did not come within %s s.", CONNECT_TIMEOUT_S)
        finally:
            if not reservation.begun.is_set():
                del self._reservations[token]
            elif reservation.websocket is not None:
                abort_connection(reservation.websocket.scope)

    async def _live(self, websocket: WebSocket) -> None:
        """Handle the WebSocket of a reserved slot."""
        token = websocket.headers.get(TOKEN_HEADER, "")
        reservation = self._reservations.get(token)
        if reservation is None or reservation.begun.is_set():
            await websocket.close(POLICY)
            return
        reservation.websocket = websocket
        reservation.begun.set()
        try:
            await Connection(websocket, self._service).run()
        finally:
            reservation.websocket = None
            del self._reservations[token]
            reservation.ended.set()

    async def _drain(self, request: Request) -> Response:
        """Close all sessions; respond when they have ended.

        Afterwards sessions are accepted again: the router sends none to a replica that really shuts down, and one that
        the controller has only lost track of, such as after its own restart, must not reject them forever.
        """
        token_sent = request.headers.get(TOKEN_HEADER, "")
        if not hmac.compare_digest(token_sent.encode("utf-8", "surrogateescape"), self._drain_token.encode()):
            return Response(status_code=403)
        slots = self._service.slots
        await slots.close(DRAIN_TIMEOUT_S)
        slots.closing.clear()
        return Response(status_code=204)


class FrameWindow:
    """Counts frames and late frames of the last seconds, over all sessions of a process.

    A dropped frame counts as late: the model was still busy with the one before.

    Args:
        metrics: The process's counters.
    """

    def __init__(self, metrics: LiveMetrics) -> None:
        self._metrics = metrics
        self._samples: deque[tuple[float, float, float]] = deque([(time.monotonic(), 0.0, 0.0)])

    def sample(self) -> tuple[float, float]:
        """Return frames and late frames since the sample before the window; to be called every few seconds."""
        now = time.monotonic()
        seen, late = self._totals()
        while len(self._samples) > 1 and now - self._samples[1][0] >= WINDOW_S:
            self._samples.popleft()
        _, seen_before, late_before = self._samples[0]
        self._samples.append((now, seen, late))
        return seen - seen_before, late - late_before

    def _totals(self) -> tuple[float, float]:
        frames = {result: total(counter) for result, counter in self._metrics.frames.items()}
        seen = frames["captioned"] + frames["silent"] + frames["dropped"]
        return seen, total(self._metrics.late) + frames["dropped"]


def total(counter: Counter) -> float:
    """Return the value of a counter that has no labels, or all of them."""
    return sum(
        sample.value for metric in counter.collect() for sample in metric.samples if sample.name.endswith("_total")
    )
