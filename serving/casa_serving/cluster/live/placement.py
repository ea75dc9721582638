"""Placement of a live session: tries replicas in turn, and connects to the first with a free slot."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.websockets import WebSocket
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException
from websockets.typing import Subprotocol

from casa_serving.cluster.live.session_ticket import TOKEN_HEADER, ReplicaShutdown, SessionRejection, SessionTicket
from casa_serving.cluster.routing_context import RoutingContext
from casa_serving.live.protocol import SUBPROTOCOL, LiveError
from casa_serving.options.live_options import MAX_MESSAGE_BYTES

LOGGER = logging.getLogger("ray.serve")
TRACE_HEADERS = ("traceparent", "tracestate")
PLACEMENT_TIMEOUT_S = 10.0
OPEN_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 5.0

ReservationCall = AsyncGenerator[SessionTicket | SessionRejection, None]


@dataclass(frozen=True)
class PlacedSession:
    """A session with a slot at a replica.

    Attributes:
        ticket: The replica's ticket for it.
        call: The Ray call that reserves the slot while it is open.
        context: Names the replica, and is notified when it shuts down.
        upstream: The WebSocket to the replica.
    """

    ticket: SessionTicket
    call: ReservationCall
    context: RoutingContext
    upstream: ClientConnection


async def place_session(websocket: WebSocket, reserve: Callable[[RoutingContext], ReservationCall]) -> PlacedSession:
    """Try one replica after the other, and connect to the first with a free slot.

    Args:
        websocket: The client's.
        reserve: See `LiveProxy.serve`.

    Raises:
        LiveError: None has a free slot, or none responds.
    """
    avoid: frozenset[str] = frozenset()
    reason = "no replica answered in time"
    try:
        async with asyncio.timeout(PLACEMENT_TIMEOUT_S):
            while True:
                context = RoutingContext(avoid=avoid, replica_shutdown=ReplicaShutdown())
                placed = await try_replica(reserve(context), context, websocket)
                if isinstance(placed, PlacedSession):
                    return placed
                reason = placed.reason
                if context.replica in avoid or not context.replica:
                    # The router chooses a replica to avoid only if there is no other.
                    raise no_free_slot(reason)
                avoid |= {context.replica}
    except (TimeoutError, BackPressureError) as error:
        raise no_free_slot(reason) from error
    except (RayError, RayServeException) as error:
        LOGGER.exception("Live session: no replica answered.")
        raise LiveError("engine_error", "No replica is available. Try again in a moment.") from error


async def try_replica(
    call: ReservationCall, context: RoutingContext, websocket: WebSocket
) -> PlacedSession | SessionRejection:
    """Try one replica; the call stays open if it has a free slot, and is closed otherwise.

    Args:
        call: The Ray call that reserves a slot.
        context: An argument of that call.
        websocket: The client's.

    Raises:
        RayError: The router found no replica.
    """
    async with contextlib.AsyncExitStack() as resources:
        await resources.enter_async_context(contextlib.aclosing(call))
        try:
            reply = await anext(call)
        except RayActorError:
            if not context.replica:
                raise
            return SessionRejection("a replica has died")
        if isinstance(reply, SessionRejection):
            return reply
        try:
            upstream = await open_upstream(reply, websocket)
        except (OSError, WebSocketException):
            LOGGER.warning("Live session: %s was not reached.", reply.url, exc_info=True)
            return SessionRejection("a replica was not reached")
        resources.pop_all()
        return PlacedSession(reply, call, context, upstream)


async def open_upstream(ticket: SessionTicket, websocket: WebSocket) -> ClientConnection:
    """Connect to a replica, with the client's subprotocol and trace.

    Raises:
        OSError: It is gone, or does not respond in time.
        WebSocketException: It rejects the handshake.
    """
    trace = {name: websocket.headers[name] for name in TRACE_HEADERS if name in websocket.headers}
    return await connect(
        ticket.url,
        subprotocols=[Subprotocol(SUBPROTOCOL)] if SUBPROTOCOL in websocket.scope["subprotocols"] else None,
        additional_headers={TOKEN_HEADER: ticket.token, **trace},
        compression=None,
        max_size=MAX_MESSAGE_BYTES,
        max_queue=1,
        open_timeout=OPEN_TIMEOUT_S,
        close_timeout=CLOSE_TIMEOUT_S,
        # The environment's proxies are for external addresses.
        proxy=None,
    )


def no_free_slot(reason: str) -> LiveError:
    """Return the protocol's error for a session that no replica has a slot for."""
    return LiveError(
        "too_many_sessions",
        f"No replica has a place for one more live session ({reason}; live.max_sessions). Try again later.",
    )
