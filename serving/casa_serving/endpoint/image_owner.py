"""ASGI middleware that tells the renderer whose the names of a request's images are (`casa_engine.image_owner`)."""

from __future__ import annotations

import hashlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from casa_engine.image_owner import OWNER


class ImageOwner:
    """Sets the owner to a digest of the key that a request brings, whether or not one is asked for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on in a context of its own: each has its own task."""
        if scope["type"] == "http":
            key = Headers(scope=scope).get("authorization", "")
            OWNER.set(hashlib.sha256(key.encode("latin-1")).hexdigest() if key else "")
        await self._app(scope, receive, send)
