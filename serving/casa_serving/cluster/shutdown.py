"""How an ingress ends with its cluster: the same towards clients as `casa-serve` (drain/), asked for by the launcher.

Ray Serve takes its proxies away first, and with them every connection, whoever still waits for an answer. So whoever
ends the cluster has every ingress take leave of its clients before.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send

from casa_serving.drain.final_messages import SHUTTING_DOWN, unavailable_response
from casa_serving.drain.open_requests import FINAL_MESSAGE_S, OpenRequests


class RequestDrain:
    """ASGI middleware outside all others: refuses requests once the ingress ends, and ends those that stay open."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request; WebSockets pass, live sessions are told in their own words."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope["app"].state
        if getattr(state, "is_ending", False):
            for message in unavailable_response(scope["path"], SHUTTING_DOWN):
                await send(message)
            return
        if not hasattr(state, "requests"):  # Here at the earliest there is an event loop.
            state.requests = OpenRequests(lambda: None)
        await state.requests.run(self._app, scope, receive, send)


async def end_requests(state: State, finish_s: float) -> None:
    """Lets open requests finish for a while, then ends them. Mutates `state`, the ingress application's."""
    state.is_ending = True
    requests: OpenRequests | None = getattr(state, "requests", None)
    if requests is not None and not await requests.wait(finish_s):
        requests.end(SHUTTING_DOWN)
        await requests.wait(2 * FINAL_MESSAGE_S)
    # What was written is still on its way through the proxies.
    await asyncio.sleep(FINAL_MESSAGE_S)
