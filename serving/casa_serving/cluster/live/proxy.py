"""Live sessions at the ingress: hands messages on between a client and the replica that has a place for it.

    client == WebSocket ==> Serve's proxy => ingress (this) == WebSocket ==> replica (live_server)

Messages pass unchanged, but for the names of settings in errors. What a replica sends is awaited on the client's side
before the next message is taken; what a client sends may be a little ahead of its replica (`Inflow`). What ends on one
side ends on the other, with its code and reason. The client is told in the protocol's own words when there is no
place, when its replica leaves, and when its replica breaks.
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

from casa_serving.cluster.live.placement import Answers, Found, find_place
from casa_serving.cluster.live.session_ticket import TOKEN_HEADER, Departure, LivePlace
from casa_serving.cluster.routing_context import RoutingNote
from casa_serving.cluster.setting_names import name_keys
from casa_serving.live.connection import first_of
from casa_serving.live.protocol import ENGINE_ERROR, POLICY, SUBPROTOCOL, Fault, LiveError
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
        self._departures: set[Departure] = set()
        self._is_ending = False

    async def end(self) -> None:
        """Has the replicas say good-bye to all sessions, and waits until they have gone; no more are taken."""
        self._is_ending = True
        for departure in self._departures:
            departure.tell()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                while self._departures:
                    await asyncio.sleep(POLL_S)

    async def serve(self, websocket: WebSocket, ask: Callable[[RoutingNote], Answers]) -> None:
        """Serves a client from the handshake to the end.

        Args:
            websocket: Not accepted yet.
            ask: Asks a replica for a place: `LiveServer.hold`, wherever the router sends it. Closing it early ends the
                session on the replica.
        """
        try:
            if self._is_ending:
                raise LiveError("engine_error", "The server is shutting down; connect again and resume with `history`.")
            found = await find_place(websocket, ask)
        except LiveError as error:
            await refuse(websocket, error)
            return
        self._departures.add(found.note.departure)
        try:
            await self._hand_on(websocket, found)
        finally:
            self._departures.discard(found.note.departure)
            await found.upstream.close(GOING_AWAY)
            await let_go(found.answers)

    async def _hand_on(self, websocket: WebSocket, found: Found) -> None:
        upstream = found.upstream
        leaving = asyncio.create_task(self._leave_with(found))
        try:
            await websocket.accept(upstream.subprotocol, found.note.response_header_pairs())
            inflow = Inflow()
            await first_of(
                take_in(websocket, inflow),
                to_replica(inflow, upstream),
                to_client(upstream, websocket),
                after_its_end(upstream),
            )
            await upstream.close()
            await close_like(websocket, upstream)
        except LiveError as error:
            await upstream.close(POLICY)
            await say_goodbye(websocket, error, POLICY, "too fast")
        except WebSocketDisconnect as left:
            await upstream.close(left.code if may_be_sent(left.code) else GOING_AWAY, (left.reason or "")[:100])
        finally:
            leaving.cancel()

    async def _leave_with(self, found: Found) -> None:
        """Has the replica say good-bye when it is about to leave; breaks with it where it says nothing."""
        await found.note.departure.wait()
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                await self._drain(found.place)
                await found.upstream.wait_closed()
        except (TimeoutError, OSError, aiohttp.ClientError):
            LOGGER.warning("Live session: its replica left without a word.")
            found.upstream.transport.abort()

    async def _drain(self, place: LivePlace) -> None:
        """Asks a replica to send its sessions away, once for all of them that are here."""
        task = self._drains.get(place.drain_url)
        if task is None:
            task = self._drains[place.drain_url] = asyncio.create_task(post_drain(place))
            task.add_done_callback(lambda _: self._drains.pop(place.drain_url))
        await asyncio.shield(task)


async def post_drain(place: LivePlace) -> None:
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


async def let_go(answers: Answers) -> None:
    """Waits until a replica has seen the end of a session; ends the call all the same if it does not."""
    try:
        async with asyncio.timeout(GOODBYE_TIMEOUT_S):
            async for _ in answers:
                pass
    except (TimeoutError, RayError, RayServeException):
        LOGGER.debug("Live session: the call that held its place did not end by itself.", exc_info=True)
    finally:
        await answers.aclose()


class Inflow:
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


async def take_in(websocket: WebSocket, inflow: Inflow) -> None:
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
        inflow.put(message["bytes"] if text is None else text)


async def to_replica(inflow: Inflow, upstream: ClientConnection) -> None:
    """Hands on what the client has sent."""
    while True:
        message = await inflow.get()
        # Where nobody takes it any more, the replica's last words are still on their way to the client.
        with contextlib.suppress(ConnectionClosed):
            await upstream.send(message)


async def to_client(upstream: ClientConnection, websocket: WebSocket) -> None:
    """Hands on what the replica sends, until it has closed the connection."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            message = await upstream.recv()
            if isinstance(message, str):
                is_error = message.startswith('{"type":"error"')
                await websocket.send_text(name_keys(message) if is_error else message)
            else:
                await websocket.send_bytes(message)


async def after_its_end(upstream: ClientConnection) -> None:
    """Ends a while after the replica has gone, for the sake of clients that do not take its last words."""
    await upstream.wait_closed()
    await asyncio.sleep(GOODBYE_TIMEOUT_S)


async def close_like(websocket: WebSocket, upstream: ClientConnection) -> None:
    """Ends the client's side as the replica has ended its own; says what happened where that broke.

    Raises:
        WebSocketDisconnect: The client left first.
    """
    code = upstream.close_code
    if code is None or code == BROKEN:
        await say_goodbye(websocket, LiveError("engine_error", REPLICA_BROKE), ENGINE_ERROR, "replica lost")
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
        await say_goodbye(
            websocket, error, POLICY if full else ENGINE_ERROR, "too many sessions" if full else "no replica"
        )


async def say_goodbye(websocket: WebSocket, error: LiveError, code: int, reason: str) -> None:
    """Sends a last error and closes; a client that does not take it is left to the server in front.

    Raises:
        WebSocketDisconnect: The client left first.
    """
    fault = Fault(code=error.code, message=str(error), fatal=True)
    with contextlib.suppress(RuntimeError, TimeoutError):  # The former where the client has left: Starlette's word.
        async with asyncio.timeout(GOODBYE_TIMEOUT_S):
            await websocket.send_text(fault.model_dump_json())
            await websocket.close(code, reason)


def may_be_sent(code: int) -> bool:
    """Tells whether a close code may stand in a close frame: some only say what became of a connection."""
    return 1000 <= code < 1004 or 1007 <= code < 1015 or 3000 <= code < 5000
