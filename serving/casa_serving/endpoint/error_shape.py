"""The last word on errors: whichever layer has answered one, it leaves in OpenAI's shape and is short.

Handlers see what is raised. vLLM also answers errors without raising them, its middlewares and
those of other packages do, and some quote the request.
"""

from __future__ import annotations

import json
from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from casa_serving.errors import error_body

# More of an error is not kept: its message is cut to far less.
MAX_KEPT_BYTES = 65_536


class ErrorShape:
    """An ASGI `send` that passes answers on, and errors as one JSON body.

    Args:
        send: Where to.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        """Sends a message, or keeps it until the error is complete."""
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
    """Returns an error of any form in OpenAI's."""
    try:
        content = json.loads(body)
    except ValueError:
        # One that was cut is not quoted.
        content = body.decode(errors="replace") if len(body) < MAX_KEPT_BYTES else None
    error = content.get("error", content.get("detail")) if isinstance(content, dict) else content
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        kind, param = (value if isinstance(value, str) else None for value in (error.get("type"), error.get("param")))
        found = error_body(status, error["message"], kind, param)
        # Anthropic's API has one more field, around the same object.
        return {"type": "error", **found} if content.get("type") == "error" else found
    message = error if isinstance(error, str) and error.strip() else HTTPStatus(status).phrase
    return error_body(status, message.strip())
