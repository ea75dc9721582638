"""Live sessions at the ingress: hands messages on between a client and the replica that has a place for it.

    client == WebSocket ==> Serve's proxy => ingress (this) == WebSocket ==> replica (live_server)

Messages pass unchanged, but for the names of settings in errors. What a replica sends is awaited on the client's side
before the next message is taken; what a client sends may be a little ahead of its replica (`BoundedMessageBuffer`).
What ends on one side ends on the other, with its code and reason. The client gets the protocol's own error event when
no slot is free, when its replica shuts down, and when its replica fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable

import aiohttp
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from casa_serving.cluster.live.placement import Answers, PlacedSession, place_session
from casa_serving.cluster.live.session_ticket import TOKEN_HEADER, ReplicaShutdown, SessionTicket
from casa_serving.cluster.routing_context import RoutingContext
from casa_serving.cluster.setting_names import name_keys
from casa_serving.live.connection import run_until_first_completes
from casa_serving.live.protocol import ENGINE_ERROR, POLICY, SUBPROTOCOL, ErrorEvent, LiveError
from casa_serving.options.live_options import MAX_MESSAGE_BYTES

LOGGER = logging.getLogger("ray.serve")
DRAIN_TIMEOUT_S = 10.0
POLL_S = 0.05
# For the last messages, once one side has ended.
GOODBYE_TIMEOUT_S = 5.0
# What a client may be ahead of its replica by.
MAX_WAITING_BYTES = 4 * MAX_MESSAGE_BYTES
MAX_WAITING_MESSAGES = 4096
NO_CODE, BROKEN, NORMAL, GOING_AWAY = 1005, 1006, 1000, 1001
REPLICA_BROKE = "The replica of this session has died; connect again and resume with `history`."


class LiveProxy:
    """All live sessions of one ingress process."""

    def __init__(self) -> None:
        self._drains: dict[str, asyncio.Task[None]] = {}
        self._departures: set[ReplicaShutdown] = set()
        self._is_ending = False

    async def end(self) -> None:
        """Has the replicas say good-bye to all sessions, and waits until they have gone; no more are taken."""
        self._is_ending = True
        for departure in self._departures:
            departure.notify()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                while self._departures:
                    await asyncio.sleep(POLL_S)

    async def serve(self, websocket: WebSocket, ask: Callable[[RoutingContext], Answers]) -> None:
        """Serves a client from the handshake to the end.

        Args:
            websocket: Not accepted yet.
            ask: Asks a replica for a slot: `LiveServer.reserve_session`, wherever the router sends it. Closing it
                early ends the session on the replica.
        """
        try:
            if self._is_ending:
                raise LiveError("engine_error", "The server is shutting down; connect again and resume with `history`.")
            placed = await place_session(websocket, ask)
        except LiveError as error:
            await refuse(websocket, error)
            return
        self._departures.add(placed.context.departure)
        try:
            await self._relay(websocket, placed)
        finally:
            self._departures.discard(placed.context.departure)
            await placed.upstream.close(GOING_AWAY)
            await drain_call(placed.answers)

    async def _relay(self, websocket: WebSocket, placed: PlacedSession) -> None:
        upstream = placed.upstream
        leaving = asyncio.create_task(self._end_with_replica(placed))
        try:
            await websocket.accept(upstream.subprotocol, placed.context.response_header_pairs())
            buffer = BoundedMessageBuffer()
            await run_until_first_completes(
                buffer_client_messages(websocket, buffer),
                relay_to_replica(buffer, upstream),
                relay_to_client(upstream, websocket),
                close_after_grace(upstream),
            )
            await upstream.close()
            await mirror_close(websocket, upstream)
        except LiveError as error:
            await upstream.close(POLICY)
            await send_error_and_close(websocket, error, POLICY, "too fast")
        except WebSocketDisconnect as left:
            await upstream.close(left.code if may_be_sent(left.code) else GOING_AWAY, (left.reason or "")[:100])
        finally:
            leaving.cancel()

    async def _end_with_replica(self, placed: PlacedSession) -> None:
        """Has the replica say good-bye when it is about to leave; breaks with it where it says nothing."""
        await placed.context.departure.wait()
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                await self._drain(placed.place)
                await placed.upstream.wait_closed()
        except (TimeoutError, OSError, aiohttp.ClientError):
            LOGGER.warning("Live session: its replica left without a word.")
            placed.upstream.transport.abort()

    async def _drain(self, place: SessionTicket) -> None:
        """Asks a replica to send its sessions away, once for all of them that are here."""
        task = self._drains.get(place.drain_url)
        if task is None:
            task = self._drains[place.drain_url] = asyncio.create_task(post_drain(place))
            task.add_done_callback(lambda _: self._drains.pop(place.drain_url))
        await asyncio.shield(task)


async def post_drain(place: SessionTicket) -> None:
    """Asks a replica to send its sessions away; returns when it has.

    Raises:
        aiohttp.ClientError: It is not there any more, or refuses.
        TimeoutError: It does not answer.
    """
    timeout = aiohttp.ClientTimeout(DRAIN_TIMEOUT_S)
    headers = {TOKEN_HEADER: place.drain_token}
    async with aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session:
        async with session.post(place.drain_url, headers=headers):
            pass


async def drain_call(answers: Answers) -> None:
    """Waits until a replica has seen the end of a session; ends the call all the same if it does not."""
    try:
        async with asyncio.timeout(GOODBYE_TIMEOUT_S):
            async for _ in answers:
                pass
    except (TimeoutError, RayError, RayServeException):
        LOGGER.debug("Live session: the call that held its place did not end by itself.", exc_info=True)
    finally:
        await answers.aclose()


class BoundedMessageBuffer:
    """What a client has sent and its replica has not taken yet.

    Serve's proxy takes in whatever a client sends, as fast as it comes, and hands all of it on: there is no way to
    hold a client up. So what it is ahead by is bounded here, and a client that goes beyond is sent away.
    """

    def __init__(self) -> None:
        self._messages: deque[str | bytes] = deque()
        self._num_bytes = 0
        self._has_some = asyncio.Event()

    def put(self, message: str | bytes) -> None:
        """Takes in a message.

        Raises:
            LiveError: Too much waits already.
        """
        self._messages.append(message)
        self._num_bytes += len(message)
        self._has_some.set()
        if self._num_bytes > MAX_WAITING_BYTES or len(self._messages) > MAX_WAITING_MESSAGES:
            raise LiveError(
                "bad_message",
                f"Too much was sent at once: {len(self._messages)} messages of {self._num_bytes} bytes wait, at most "
                f"{MAX_WAITING_MESSAGES} of {MAX_WAITING_BYTES} may. Send frames at the pace of the video; connect "
                "again and resume with `history`.",
            )

    async def get(self) -> str | bytes:
        """Waits for the next message."""
        while not self._messages:
            self._has_some.clear()
            await self._has_some.wait()
        message = self._messages.popleft()
        self._num_bytes -= len(message)
        return message


async def buffer_client_messages(websocket: WebSocket, buffer: BoundedMessageBuffer) -> None:
    """Takes in what the client sends.

    Raises:
        WebSocketDisconnect: The client has left.
        LiveError: It sends more than its replica takes.
    """
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", NO_CODE), message.get("reason"))
        text = message.get("text")
        buffer.put(message["bytes"] if text is None else text)


async def relay_to_replica(buffer: BoundedMessageBuffer, upstream: ClientConnection) -> None:
    """Hands on what the client has sent."""
    while True:
        message = await buffer.get()
        # Where nobody takes it any more, the replica's last words are still on their way to the client.
        with contextlib.suppress(ConnectionClosed):
            await upstream.send(message)


async def relay_to_client(upstream: ClientConnection, websocket: WebSocket) -> None:
    """Hands on what the replica sends, until it has closed the connection."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            message = await upstream.recv()
            if isinstance(message, str):
                is_error = message.startswith('{"type":"error"')
                await websocket.send_text(name_keys(message) if is_error else message)
            else:
                await websocket.send_bytes(message)


async def close_after_grace(upstream: ClientConnection) -> None:
    """Ends a while after the replica has gone, for the sake of clients that do not take its last words."""
    await upstream.wait_closed()
    await asyncio.sleep(GOODBYE_TIMEOUT_S)


async def mirror_close(websocket: WebSocket, upstream: ClientConnection) -> None:
    """Ends the client's side as the replica has ended its own; says what happened where that broke.

    Raises:
        WebSocketDisconnect: The client left first.
    """
    code = upstream.close_code
    if code is None or code == BROKEN:
        await send_error_and_close(websocket, LiveError("engine_error", REPLICA_BROKE), ENGINE_ERROR, "replica lost")
        return
    with contextlib.suppress(RuntimeError, TimeoutError):
        async with asyncio.timeout(GOODBYE_TIMEOUT_S):
            await websocket.close(code if may_be_sent(code) else NORMAL, upstream.close_reason)


async def refuse(websocket: WebSocket, error: LiveError) -> None:
    """Accepts a client only to tell it why there is no session."""
    subprotocol = SUBPROTOCOL if SUBPROTOCOL in websocket.scope["subprotocols"] else None
    full = error.code == "too_many_sessions"
    with contextlib.suppress(WebSocketDisconnect):
        await websocket.accept(subprotocol)
        await send_error_and_close(
            websocket, error, POLICY if full else ENGINE_ERROR, "too many sessions" if full else "no replica"
        )


async def send_error_and_close(websocket: WebSocket, error: LiveError, code: int, reason: str) -> None:
    """Sends a last error and closes; a client that does not take it is left to the server in front.

    Raises:
        WebSocketDisconnect: The client left first.
    """
    fault = ErrorEvent(code=error.code, message=str(error), fatal=True)
    with contextlib.suppress(RuntimeError, TimeoutError):  # The former where the client has left: Starlette's word.
        async with asyncio.timeout(GOODBYE_TIMEOUT_S):
            await websocket.send_text(fault.model_dump_json())
            await websocket.close(code, reason)


def may_be_sent(code: int) -> bool:
    """Returns whether a close code may stand in a close frame: some only say what became of a connection."""
    return 1000 <= code < 1004 or 1007 <= code < 1015 or 3000 <= code < 5000
