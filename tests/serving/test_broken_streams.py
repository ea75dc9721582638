"""A stream whose application fails in the middle ends with its API's error event, not with a broken connection."""

import json

import pytest

from casa_serving.drain.open_requests import OpenRequests
from casa_serving.errors import INTERNAL_ERROR_MESSAGE, RequestError

FIRST = b'data: {"sequence_number": 6}\n\n'
SECRET = "a secret of the server"


async def answer(path, error, *, content_type=b"text/event-stream"):
    """Return the bodies that are sent for an application that begins an answer and fails."""
    bodies = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type)]})
        await send({"type": "http.response.body", "body": FIRST, "more_body": True})
        # As Starlette does with what it has a handler for.
        raise RuntimeError("Caught handled exception, but response already started.") from error

    async def send(message):
        bodies.append(message.get("body"))

    await OpenRequests(lambda: None).run(app, {"type": "http", "path": path}, None, send)
    return bodies[1:]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(RequestError(400, "Send less."), 400, "Send less."), (ValueError(SECRET), 500, INTERNAL_ERROR_MESSAGE)],
)
async def test_a_stream_that_fails_ends_with_an_event(error, status, message):
    first, chat = await answer("/v1/chat/completions", error)
    assert first == FIRST
    event, done = chat.decode().strip().split("\n\n")
    said = json.loads(event.removeprefix("data: "))["error"]
    assert (said["code"], said["message"], done) == (status, message, "data: [DONE]")
    _, responses = await answer("/v1/responses", error)
    name, data = responses.decode().strip().split("\n")
    said = json.loads(data.removeprefix("data: "))
    assert (name, said["sequence_number"], said["message"]) == ("event: error", 7, message)
    _, messages = await answer("/v1/messages", error)
    said = json.loads(messages.decode().strip().split("\n")[1].removeprefix("data: "))["error"]
    assert said["message"] == message
    assert said["type"] == ("invalid_request_error" if status == 400 else "api_error")


async def test_what_is_no_stream_cannot_be_mended():
    with pytest.raises(RuntimeError, match="response already started"):
        await answer("/v1/chat/completions", ValueError(SECRET), content_type=b"application/json")
