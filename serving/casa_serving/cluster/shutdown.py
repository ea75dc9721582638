"""Graceful shutdown of an ingress, requested by the launcher; clients see the same as from `casa-serve` (drain/).

Ray Serve stops its proxies first, and with them every connection, also those with open requests. So the launcher drains
every ingress before it stops the cluster.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send

from casa_serving.drain.final_messages import SHUTTING_DOWN, unavailable_response
from casa_serving.drain.open_requests import FINAL_MESSAGE_S, OpenRequests


class RequestDrain:
    """Outermost ASGI middleware: rejects requests once the ingress shuts down, and ends those that stay open."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; WebSockets pass, live sessions are closed by `LiveProxy`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope["app"].state
        if getattr(state, "is_ending", False):
            for message in unavailable_response(scope["path"], SHUTTING_DOWN):
                await send(message)
            return
        if not hasattr(state, "requests"):  # Not earlier: this needs the running event loop.
            state.requests = OpenRequests(lambda: None)
        await state.requests.run(self._app, scope, receive, send)


async def end_requests(state: State, finish_s: float) -> None:
    """Let open requests finish within `finish_s` seconds, then end them. Mutates `state`, the application's."""
    state.is_ending = True
    requests: OpenRequests | None = getattr(state, "requests", None)
    if requests is not None and not await requests.wait(finish_s):
        requests.end(SHUTTING_DOWN)
        await requests.wait(2 * FINAL_MESSAGE_S)
    # The final messages are still on their way through the proxies.
    await asyncio.sleep(FINAL_MESSAGE_S)
