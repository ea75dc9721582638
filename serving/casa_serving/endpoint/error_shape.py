"""Normalisation of error responses: whichever layer sends one, the client gets OpenAI's format, truncated.

Exception handlers see only what is raised. vLLM, its middleware and that of other packages also send
error responses themselves, and some quote the request.
"""

from __future__ import annotations

import json
from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from casa_serving.errors import error_body

# Longer error bodies are truncated: the message is cut to far less.
MAX_KEPT_BYTES = 65_536


class ErrorShape:
    """An ASGI `send` that forwards responses, and error responses as one JSON body.

    Args:
        send: ASGI's `send` of the client.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        """Forward a message, or buffer it until the error response is complete."""
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._start = message
        elif self._start is None:
            await self._send(message)
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")[: MAX_KEPT_BYTES - len(self._body)]
            if not message.get("more_body", False):
                await self._send_error(self._start)

    async def _send_error(self, start: Message) -> None:
        self._start = None
        body = json.dumps(shape(start["status"], bytes(self._body))).encode()
        headers = MutableHeaders(raw=list(start["headers"]))
        headers["content-type"] = "application/json"
        headers["content-length"] = str(len(body))
        await self._send({**start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body})


def shape(status: int, body: bytes) -> dict[str, object]:
    """Return the body of an error response in OpenAI's format."""
    try:
        content = json.loads(body)
    except ValueError:
        # A truncated body is not quoted.
        content = body.decode(errors="replace") if len(body) < MAX_KEPT_BYTES else None
    error = content.get("error", content.get("detail")) if isinstance(content, dict) else content
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        kind, param = (value if isinstance(value, str) else None for value in (error.get("type"), error.get("param")))
        found = error_body(status, error["message"], kind, param)
        # Anthropic's API wraps the same object with one more field.
        return {"type": "error", **found} if content.get("type") == "error" else found
    message = error if isinstance(error, str) and error.strip() else HTTPStatus(status).phrase
    return error_body(status, message.strip())
