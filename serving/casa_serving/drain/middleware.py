"""Outermost ASGI middleware: accepts requests until the server shuts down (shutdown.py)."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from casa_serving.drain.final_messages import unavailable_response
from casa_serving.drain.shutdown import ServerShutdown

# Still answered while the server shuts down.
OPEN_PATHS = ("/metrics",)


class Drain:
    """Forwards requests, rejects them with 503 once shutdown has begun, and ends those that stay open.

    WebSockets pass: live sessions are closed by their own hook (`shutdown_hooks` in the application's state).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._shutdown: ServerShutdown | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or the lifespan of the application."""
        if scope["type"] == "lifespan":
            await self._run_lifespan(scope, receive, send)
        elif scope["type"] != "http" or self._shutdown is None:
            await self._app(scope, receive, send)
        elif self._shutdown.reason is not None and scope["path"] not in OPEN_PATHS:
            for message in unavailable_response(scope["path"], self._shutdown.reason):
                await send(message)
        else:
            await self._shutdown.requests.run(self._app, scope, receive, send)

    async def _run_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        # vLLM installs its own signal handlers before it starts the server, so that ours replace them here.
        self._shutdown = ServerShutdown(scope["app"].state)
        try:
            await self._app(scope, receive, send)
        finally:
            self._shutdown.close()
