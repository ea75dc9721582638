"""Finds a place for a live session: replicas are asked in turn, and the first that has one is connected to."""

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

from casa_serving.cluster.live.session_ticket import TOKEN_HEADER, LiveRefusal, ReplicaShutdown, SessionTicket
from casa_serving.cluster.routing_context import RoutingContext
from casa_serving.live.protocol import SUBPROTOCOL, LiveError
from casa_serving.options.live_options import MAX_MESSAGE_BYTES

LOGGER = logging.getLogger("ray.serve")
PLACE_TIMEOUT_S = 10.0
OPEN_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 5.0

Answers = AsyncGenerator[SessionTicket | LiveRefusal, None]


@dataclass(frozen=True)
class PlacedSession:
    """A session's place.

    Attributes:
        place: At the replica.
        answers: The call that holds it.
        context: Which replica that is, and whether it leaves.
        upstream: The WebSocket to it.
    """

    place: SessionTicket
    answers: Answers
    context: RoutingContext
    upstream: ClientConnection


async def place_session(websocket: WebSocket, ask: Callable[[RoutingContext], Answers]) -> PlacedSession:
    """Asks one replica after the other, and connects to the first that has a place.

    Args:
        websocket: The client's.
        ask: See `LiveProxy.serve`.

    Raises:
        LiveError: None has a place, or none answers.
    """
    avoid: frozenset[str] = frozenset()
    reason = "no replica answered in time"
    try:
        async with asyncio.timeout(PLACE_TIMEOUT_S):
            while True:
                context = RoutingContext(avoid=avoid, departure=ReplicaShutdown())
                placed = await try_replica(ask(context), context, websocket.scope["subprotocols"])
                if isinstance(placed, PlacedSession):
                    return placed
                reason = placed.reason
                if context.replica in avoid or not context.replica:
                    # The router sends it to a replica that was asked before only where there is no other.
                    raise no_free_slot(reason)
                avoid |= {context.replica}
    except (TimeoutError, BackPressureError) as error:
        raise no_free_slot(reason) from error
    except (RayError, RayServeException) as error:
        LOGGER.exception("Live session: no replica answered.")
        raise LiveError("engine_error", "No replica is available. Try again in a moment.") from error


async def try_replica(answers: Answers, context: RoutingContext, offered: list[str]) -> PlacedSession | LiveRefusal:
    """Asks one replica; the call stays open if there is a place, and is closed otherwise.

    Args:
        answers: The call.
        context: Went with it.
        offered: The client's subprotocols.

    Raises:
        RayError: The router placed no replica.
    """
    async with contextlib.AsyncExitStack() as held:
        await held.enter_async_context(contextlib.aclosing(answers))
        try:
            answer = await anext(answers)
        except RayActorError:
            if not context.replica:
                raise
            return LiveRefusal("a replica has died")
        if isinstance(answer, LiveRefusal):
            return answer
        try:
            upstream = await open_upstream(answer, offered)
        except (OSError, WebSocketException):
            LOGGER.warning("Live session: %s was not reached.", answer.url, exc_info=True)
            return LiveRefusal("a replica was not reached")
        held.pop_all()
        return PlacedSession(answer, answers, context, upstream)


async def open_upstream(place: SessionTicket, offered: list[str]) -> ClientConnection:
    """Connects to a replica.

    Raises:
        OSError: It is not there, or does not answer in time.
        WebSocketException: It refuses.
    """
    return await connect(
        place.url,
        subprotocols=[Subprotocol(SUBPROTOCOL)] if SUBPROTOCOL in offered else None,
        additional_headers={TOKEN_HEADER: place.token},
        compression=None,
        max_size=MAX_MESSAGE_BYTES,
        max_queue=1,
        open_timeout=OPEN_TIMEOUT_S,
        close_timeout=CLOSE_TIMEOUT_S,
        # The environment's proxies are for the world outside.
        proxy=None,
    )


def no_free_slot(reason: str) -> LiveError:
    """Returns the protocol's answer to a client that finds no place anywhere."""
    return LiveError(
        "too_many_sessions",
        f"No replica has a place for one more live session ({reason}; live.max_sessions). Try again later.",
    )
