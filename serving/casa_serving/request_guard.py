"""ASGI middleware before everything else: no huge bodies, no doors meant for other servers, no foreign pages.

Neither uvicorn nor FastAPI bounds a body, and an image inside JSON is only seen when all of
it was read and parsed. vLLM creates middleware without arguments, so the limit is read from
the server's own arguments, which it keeps in the app's state.

The paths that are closed are those by which the parts of a divided vLLM talk to each other.
They take image tensors that another server has prepared, past every check of images, and
commands to resize the engine. vLLM 0.29.0 opens them to everybody; 0.32.0 no longer does.
"""

from __future__ import annotations

import base64
import json
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DEFAULT_MAX_REQUEST_BYTES = 100_000_000


# "casa-key." and the key in base64url; vLLM guards WebSockets under /v1 by their Authorization header.
KEY_PREFIX = "casa-key."
CLOSED_PATHS = ("/inference/", "/scale_elastic_ep", "/is_scaling_elastic_ep")
CLOSED_ENDINGS = ("/render", "/derender")


class RequestGuard:
    """Answers 413 to a body over `--max-request-bytes`, 404 to closed paths, 403 to foreign pages' WebSockets."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on if its body is within the limit, and a WebSocket if its page may open it."""
        if scope["type"] == "websocket":
            await self._open_socket(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path.startswith(CLOSED_PATHS) or path.endswith(CLOSED_ENDINGS):
            await answer(send, 404, "NotFoundError", f"There is no {path!r} on this server.")
            return
        limit = scope["app"].state.args.max_request_bytes
        length = declared_length(scope)
        if length is None and is_chunked(scope):
            messages = await read_body(receive, limit)
            if messages is None:
                await refuse(send, f"more than {limit}", limit)
                return
            receive = replay(messages, receive)
        elif length is not None and length > limit:
            await refuse(send, str(length), limit)
            return
        await self._app(scope, receive, send)

    async def _open_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed = scope["app"].state.args.allowed_origins
        if not is_own_origin(Headers(scope=scope), allowed):
            message = (
                "Pages of this origin may not open a WebSocket here: the operator can name it in --allowed-origins."
            )
            await JSONResponse({"error": message}, 403)(scope, receive, send)
            return
        take_key(scope)
        await self._app(scope, receive, send)


def is_own_origin(headers: Headers, allowed: list[str]) -> bool:
    """Tells whether a WebSocket comes from a page of this server, from an allowed one, or from no page at all.

    Browsers let every page open a WebSocket to every server, with CORS left out of it, and say
    in `Origin` which page it is. Programs send no such header.
    """
    origin = headers.get("origin")
    if origin is None or "*" in allowed or origin in allowed:
        return True
    try:
        return urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
    except ValueError:
        return False  # No browser writes such an origin.


def take_key(scope: Scope) -> None:
    """Moves an API key from the offered subprotocols to where vLLM looks for it.

    A page cannot set headers on a WebSocket; what it can set are names of subprotocols.

    Mutates:
        scope: its headers and subprotocols; the key is never answered as the chosen one.
    """
    offered = scope["subprotocols"]
    keys = [name.removeprefix(KEY_PREFIX) for name in offered if name.startswith(KEY_PREFIX)]
    scope["subprotocols"] = [name for name in offered if not name.startswith(KEY_PREFIX)]
    if not keys or any(name == b"authorization" for name, _ in scope["headers"]):
        return
    try:
        key = base64.urlsafe_b64decode(keys[0] + "=" * (-len(keys[0]) % 4))
    except ValueError:
        return  # No key at all: refused where keys are asked for.
    scope["headers"] = [*scope["headers"], (b"authorization", b"Bearer " + key)]


def declared_length(scope: Scope) -> int | None:
    """Returns the request's Content-Length; the HTTP server has checked that it is a number."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)
    return None


def is_chunked(scope: Scope) -> bool:
    """Tells whether the request has a body of undeclared length."""
    return any(name == b"transfer-encoding" for name, _ in scope["headers"])


async def read_body(receive: Receive, limit: int) -> list[Message] | None:
    """Reads a body of undeclared length; returns None as soon as it exceeds `limit`."""
    messages: list[Message] = []
    received = 0
    while True:
        message = await receive()
        messages.append(message)
        received += len(message.get("body", b""))
        if received > limit:
            return None
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages


def replay(messages: list[Message], receive: Receive) -> Receive:
    """Returns a `receive` that gives the messages that were read, then what comes after."""
    waiting = iter(messages)

    async def again() -> Message:
        for message in waiting:
            return message
        return await receive()

    return again


async def refuse(send: Send, got: str, limit: int) -> None:
    """Answers 413 and closes the connection, on which the rest of the body is still coming."""
    message = (
        f"The request is too large: got {got} bytes, at most {limit} are taken "
        "(--max-request-bytes). Send fewer or smaller images in one request."
    )
    await answer(send, 413, "RequestTooLargeError", message)


async def answer(send: Send, status: int, kind: str, message: str) -> None:
    """Answers in the shape of an OpenAI error."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
