"""Error messages for requests that cannot be completed, in the format of the API that the client uses.

Before the response has begun that is status 503; within a stream it is the API's own error event.
"""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.types import Message

from casa_serving.errors import INTERNAL_ERROR_MESSAGE, RequestError, error_body, error_kind

SHUTTING_DOWN = "The server is shutting down. Send the request again, to another server or in a moment."
STATUS = 503
ANTHROPIC_KINDS = {500: "api_error", STATUS: "overloaded_error"}
RETRY_AFTER_S = 1
SEQUENCE_NUMBER = re.compile(rb'"sequence_number": ?(\d+)')


def unavailable_response(path: str, message: str) -> list[Message]:
    """Return the ASGI messages of a complete 503 response that closes the connection.

    Args:
        path: Path of the request, which determines the API.
        message: Error message for the client.
    """
    body = json.dumps(body_for(path, message, STATUS)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", str(RETRY_AFTER_S).encode()),
        (b"connection", b"close"),
    ]
    return [
        {"type": "http.response.start", "status": STATUS, "headers": headers},
        {"type": "http.response.body", "body": body},
    ]


def end_of_stream(path: str, message: str, last_event: bytes, status: int = STATUS, kind: str | None = None) -> Message:
    """Return the last ASGI message of a stream of server-sent events: the API's error event.

    Args:
        path: Path of the request, which determines the API.
        message: Error message for the client.
        last_event: The event sent last; the events of /v1/responses are numbered.
        status: HTTP status that the error would have had before the response began.
        kind: The error's type in OpenAI's APIs; default: that of the status.
    """
    if path.endswith("/messages"):
        data = named_event("error", body_for(path, message, status))
    elif path.endswith("/responses"):
        numbers = SEQUENCE_NUMBER.findall(last_event)
        number = int(numbers[-1]) + 1 if numbers else 0
        event = {
            "type": "error",
            "code": kind or error_kind(status),
            "message": message,
            "param": None,
            "sequence_number": number,
        }
        data = named_event("error", event)
    else:
        data = f"data: {json.dumps(error_body(status, message, kind))}\n\ndata: [DONE]\n\n".encode()
    return {"type": "http.response.body", "body": data}


def status_and_message(error: BaseException) -> tuple[int, str]:
    """Return status and message for an exception that ended a stream: a `RequestError`'s own, otherwise 500."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, RequestError):
        cause = cause.__cause__ or cause.__context__
    return (500, INTERNAL_ERROR_MESSAGE) if cause is None else (cause.status, str(cause))


def body_for(path: str, message: str, status: int) -> dict[str, Any]:
    """Return the error body of the API: Anthropic's for its own path, OpenAI's for all others."""
    if path.endswith("/messages"):
        return {
            "type": "error",
            "error": {"type": ANTHROPIC_KINDS.get(status, "invalid_request_error"), "message": message},
        }
    return error_body(status, message)


def named_event(name: str, data: dict[str, Any]) -> bytes:
    """Return one named server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
