"""ASGI middleware outside all others: takes requests until the server ends (departure)."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from casa_serving.drain.final_messages import refusal
from casa_serving.drain.shutdown import ServerShutdown

# What is still answered while the server ends.
OPEN_PATHS = ("/metrics",)


class Drain:
    """Hands requests on, refuses them with 503 once the server is about to end, and ends those that stay open.

    WebSockets pass: a live session is told in its own words (`goodbyes` in the application's state).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._departure: ServerShutdown | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or the whole life of the server."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] != "http" or self._departure is None:
            await self._app(scope, receive, send)
        elif self._departure.reason is not None and scope["path"] not in OPEN_PATHS:
            for message in refusal(scope["path"], self._departure.reason):
                await send(message)
        else:
            await self._departure.requests.run(self._app, scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        # vLLM has set its own handlers of signals before it starts the server, of which this is the first step.
        self._departure = ServerShutdown(scope["app"].state)
        try:
            await self._app(scope, receive, send)
        finally:
            self._departure.close()
