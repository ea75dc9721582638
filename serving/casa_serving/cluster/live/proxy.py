"""Live sessions at the ingress: relays messages between a client and its replica.

    client == WebSocket ==> Serve's proxy => ingress (this) == WebSocket ==> replica (replica_server.py)

Messages are relayed unchanged, except for the names of settings in errors. A replica's message is sent to the client
before the next one is received; a client's messages are buffered within limits (`BoundedMessageBuffer`). When one side
ends, the other is closed with its code and reason. The client gets the protocol's own error event when no slot is free,
when its replica shuts down, and when its replica fails.
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

from casa_serving.cluster.live.placement import PlacedSession, ReservationCall, place_session
from casa_serving.cluster.live.session_ticket import TOKEN_HEADER, ReplicaShutdown, SessionTicket
from casa_serving.cluster.routing_context import RoutingContext
from casa_serving.cluster.setting_names import name_keys
from casa_serving.live.connection import run_until_first_completes
from casa_serving.live.protocol import ENGINE_ERROR, POLICY, SUBPROTOCOL, ErrorEvent, LiveError
from casa_serving.options.live_options import MAX_MESSAGE_BYTES

LOGGER = logging.getLogger("ray.serve")
DRAIN_TIMEOUT_S = 10.0
POLL_S = 0.05
# For the final messages, once one side has ended.
CLOSE_TIMEOUT_S = 5.0
# Limits of the buffer of a client's messages.
MAX_WAITING_BYTES = 4 * MAX_MESSAGE_BYTES
MAX_WAITING_MESSAGES = 4096
NO_CODE, ABNORMAL, NORMAL, GOING_AWAY = 1005, 1006, 1000, 1001
REPLICA_LOST = "The replica of this session has died; connect again and resume with `history`."


class LiveProxy:
    """All live sessions of one ingress process."""

    def __init__(self) -> None:
        self._drains: dict[str, asyncio.Task[None]] = {}
        self._replica_shutdowns: set[ReplicaShutdown] = set()
        self._is_ending = False

    async def end(self) -> None:
        """Make the replicas close all sessions and wait for it; new sessions are rejected."""
        self._is_ending = True
        for replica_shutdown in self._replica_shutdowns:
            replica_shutdown.notify()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                while self._replica_shutdowns:
                    await asyncio.sleep(POLL_S)

    async def serve(self, websocket: WebSocket, reserve: Callable[[RoutingContext], ReservationCall]) -> None:
        """Serve a client from the handshake to the close frame.

        Args:
            websocket: Not accepted yet.
            reserve: Calls `LiveServer.reserve_session` of a replica that the router chooses. Closing the call early
                ends the session on the replica.
        """
        try:
            if self._is_ending:
                raise LiveError("engine_error", "The server is shutting down; connect again and resume with `history`.")
            placed = await place_session(websocket, reserve)
        except LiveError as error:
            await reject(websocket, error)
            return
        self._replica_shutdowns.add(placed.context.replica_shutdown)
        try:
            await self._relay(websocket, placed)
        finally:
            self._replica_shutdowns.discard(placed.context.replica_shutdown)
            await placed.upstream.close(GOING_AWAY)
            await drain_call(placed.call)

    async def _relay(self, websocket: WebSocket, placed: PlacedSession) -> None:
        upstream = placed.upstream
        closing = asyncio.create_task(self._close_with_replica(placed))
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
            closing.cancel()

    async def _close_with_replica(self, placed: PlacedSession) -> None:
        """Make the replica close the session when it shuts down; abort the connection if it does not."""
        await placed.context.replica_shutdown.wait()
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                await self._drain(placed.ticket)
                await placed.upstream.wait_closed()
        except (TimeoutError, OSError, aiohttp.ClientError):
            LOGGER.warning("Live session: its replica shut down without closing it.")
            placed.upstream.transport.abort()

    async def _drain(self, ticket: SessionTicket) -> None:
        """Make a replica close its sessions; one request for all sessions of this ingress."""
        task = self._drains.get(ticket.drain_url)
        if task is None:
            task = self._drains[ticket.drain_url] = asyncio.create_task(post_drain(ticket))
            task.add_done_callback(lambda _: self._drains.pop(ticket.drain_url))
        await asyncio.shield(task)


async def post_drain(ticket: SessionTicket) -> None:
    """Request a replica to close its sessions; return when it has.

    Raises:
        aiohttp.ClientError: It is gone, or rejects the request.
        TimeoutError: It does not respond.
    """
    timeout = aiohttp.ClientTimeout(DRAIN_TIMEOUT_S)
    headers = {TOKEN_HEADER: ticket.drain_token}
    async with aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session:
        async with session.post(ticket.drain_url, headers=headers):
            pass


async def drain_call(call: ReservationCall) -> None:
    """Wait until the replica ends the call after the end of the session; cancel the call after a timeout."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            async for _ in call:
                pass
    except (TimeoutError, RayError, RayServeException):
        LOGGER.debug("Live session: the call that reserved its slot did not end by itself.", exc_info=True)
    finally:
        await call.aclose()


class BoundedMessageBuffer:
    """Buffer of the messages that a client has sent and its replica has not received yet.

    Serve's proxy receives and forwards whatever a client sends, as fast as it comes, without backpressure. So the
    buffer is limited here, and a client that exceeds the limit is disconnected.
    """

    def __init__(self) -> None:
        self._messages: deque[str | bytes] = deque()
        self._num_bytes = 0
        self._has_some = asyncio.Event()

    def put(self, message: str | bytes) -> None:
        """Add a message.

        Raises:
            LiveError: The buffer is over its limit.
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
        """Wait for the next message."""
        while not self._messages:
            self._has_some.clear()
            await self._has_some.wait()
        message = self._messages.popleft()
        self._num_bytes -= len(message)
        return message


async def buffer_client_messages(websocket: WebSocket, buffer: BoundedMessageBuffer) -> None:
    """Receive the client's messages into the buffer.

    Raises:
        WebSocketDisconnect: The client disconnected.
        LiveError: The buffer is over its limit.
    """
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", NO_CODE), message.get("reason"))
        text = message.get("text")
        buffer.put(message["bytes"] if text is None else text)


async def relay_to_replica(buffer: BoundedMessageBuffer, upstream: ClientConnection) -> None:
    """Relay the client's messages."""
    while True:
        message = await buffer.get()
        # After the replica has closed, its final messages may still be on their way to the client.
        with contextlib.suppress(ConnectionClosed):
            await upstream.send(message)


async def relay_to_client(upstream: ClientConnection, websocket: WebSocket) -> None:
    """Relay the replica's messages until it has closed the connection."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            message = await upstream.recv()
            if isinstance(message, str):
                is_error = message.startswith('{"type":"error"')
                await websocket.send_text(name_keys(message) if is_error else message)
            else:
                await websocket.send_bytes(message)


async def close_after_grace(upstream: ClientConnection) -> None:
    """Return some time after the replica has closed, in case the client does not read the final messages."""
    await upstream.wait_closed()
    await asyncio.sleep(CLOSE_TIMEOUT_S)


async def mirror_close(websocket: WebSocket, upstream: ClientConnection) -> None:
    """Close the client's side with the replica's code and reason, or with an error if the replica was lost.

    Raises:
        WebSocketDisconnect: The client disconnected first.
    """
    code = upstream.close_code
    if code is None or code == ABNORMAL:
        await send_error_and_close(websocket, LiveError("engine_error", REPLICA_LOST), ENGINE_ERROR, "replica lost")
        return
    with contextlib.suppress(RuntimeError, TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await websocket.close(code if may_be_sent(code) else NORMAL, upstream.close_reason)


async def reject(websocket: WebSocket, error: LiveError) -> None:
    """Accept the handshake, send the error and close."""
    subprotocol = SUBPROTOCOL if SUBPROTOCOL in websocket.scope["subprotocols"] else None
    full = error.code == "too_many_sessions"
    with contextlib.suppress(WebSocketDisconnect):
        await websocket.accept(subprotocol)
        await send_error_and_close(
            websocket, error, POLICY if full else ENGINE_ERROR, "too many sessions" if full else "no replica"
        )


async def send_error_and_close(websocket: WebSocket, error: LiveError, code: int, reason: str) -> None:
    """Send a fatal error event and close; a client that does not read it is left to Serve's proxy.

    Raises:
        WebSocketDisconnect: The client disconnected first.
    """
    event = ErrorEvent(code=error.code, message=str(error), fatal=True)
    with contextlib.suppress(RuntimeError, TimeoutError):  # Starlette raises the former after a disconnect.
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await websocket.send_text(event.model_dump_json())
            await websocket.close(code, reason)


def may_be_sent(code: int) -> bool:
    """Return whether a close code is allowed in a close frame: some are for local use only."""
    return 1000 <= code < 1004 or 1007 <= code < 1015 or 3000 <= code < 5000
