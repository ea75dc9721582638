"""Keeps out clients without the key, as vLLM's own server does: same variable, same middleware."""

from __future__ import annotations

import os

from starlette.types import ASGIApp, Receive, Scope, Send

VARIABLE = "VLLM_API_KEY"


class ApiKey:
    """Asks for `Authorization: Bearer KEY` under /v1 where VLLM_API_KEY is set in the process that answers.

    Read there and not where the application is built, so that the key stands in no configuration
    that Ray stores and shows.
    """

    def __init__(self, app: ASGIApp) -> None:
        from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

        key = os.environ.get(VARIABLE)
        self._app: ASGIApp = AuthenticationMiddleware(app, [key]) if key else app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See vLLM's `AuthenticationMiddleware`."""
        await self._app(scope, receive, send)


def key_header() -> dict[str, str]:
    """Returns the header that opens the server from this environment; empty where no key is asked for."""
    key = os.environ.get(VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}
