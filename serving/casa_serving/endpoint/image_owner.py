"""ASGI middleware that sets the owner of a request's image names for the renderer (`casa_engine.image_owner`)."""

from __future__ import annotations

import hashlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from casa_engine.image_owner import OWNER


class ImageOwner:
    """Sets the owner to a digest of the request's API key, whether or not the server requires one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Set the context variable, which is per request because each request has its own task, and call the app."""
        if scope["type"] == "http":
            key = Headers(scope=scope).get("authorization", "")
            OWNER.set(hashlib.sha256(key.encode("latin-1")).hexdigest() if key else "")
        await self._app(scope, receive, send)
