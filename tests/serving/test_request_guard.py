"""Bodies in bounded time and memory: many at once, slow ones, and those that do not end."""

import asyncio
import json
from argparse import Namespace

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from casa_serving.endpoint.request_guard import RequestGuard

pytestmark = pytest.mark.unit

JSON = [(b"content-type", b"application/json")]


class Client:
    """Speaks ASGI to an application behind the guard, one piece of a body at a time."""

    def __init__(self, handler=None, **limits):
        async def echo(request: Request):
            return JSONResponse({"got": (await request.body()).decode()})

        self.app = Starlette(routes=[Route("/x", handler or echo, methods=["POST"])])
        self.app.state.args = Namespace(allowed_origins=[], **limits)
        self.app.add_middleware(RequestGuard)

    async def post(self, pieces, *, headers=(), end=True):
        """Return status, headers and body of the answer to a body in pieces; None where there is none."""
        sent, ended = [], []
        pieces = aiter_of(pieces) if isinstance(pieces, list) else pieces

        async def receive():
            async for piece in pieces:
                return {"type": "http.request", "body": piece, "more_body": True}
            if end and not ended:
                ended.append(True)
                return {"type": "http.request", "body": b"", "more_body": False}
            # As uvicorn does: nothing comes until the client leaves.
            await asyncio.sleep(3600)

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/x",
            "query_string": b"",
            "headers": [*JSON, (b"transfer-encoding", b"chunked"), *headers],
        }
        await self.app(scope, receive, send)
        if not sent:
            return None
        return sent[0]["status"], dict(sent[0]["headers"]), b"".join(message["body"] for message in sent[1:])


async def aiter_of(pieces):
    for piece in pieces:
        if isinstance(piece, float):
            await asyncio.sleep(piece)
        else:
            yield piece


def message_of(answer):
    return json.loads(answer[2])["error"]["message"]


async def test_a_body_that_stops_coming_is_given_up():
    client = Client(request_read_timeout=0.2)
    status, headers, _ = answer = await client.post([b'{"a": "' + b"x" * 1000], end=False)
    assert status == 408
    assert headers[b"connection"] == b"close"
    assert "got 1007 bytes in 0.2 s (--request-read-timeout)" in message_of(answer)


async def test_a_body_that_trickles_is_given_up_too():
    status, *_ = await Client(request_read_timeout=0.3).post([b" ", 0.1] * 100)
    assert status == 408


async def test_bytes_in_flight_are_bounded_over_all_requests_and_given_back():
    """Those that are being read count, and those of requests that are being answered."""
    release = asyncio.Event()

    async def wait(request: Request):
        await request.body()
        await release.wait()
        return JSONResponse({})

    client = Client(wait, max_request_bytes=600, max_request_bytes_in_flight=1000, request_read_timeout=1.0)
    body = [b'{"a": "' + b"x" * 400, b'"}']
    first = asyncio.create_task(client.post(body))
    half_sent = asyncio.create_task(client.post([b'{"a": "' + b"x" * 400], end=False))
    await asyncio.sleep(0.1)
    status, headers, _ = refused = await client.post(body)
    assert status == 429
    assert headers[b"retry-after"] == b"1"
    assert "--max-request-bytes-in-flight" in message_of(refused)
    assert (await half_sent)[0] == 408
    third = asyncio.create_task(client.post(body))
    await asyncio.sleep(0.1)
    assert not third.done()
    release.set()
    assert (await first)[0] == (await third)[0] == 200
    assert (await client.post(body))[0] == 200


async def test_bytes_are_given_back_whatever_happens():
    async def fail(request: Request):
        raise RuntimeError("a fault of ours")

    client = Client(fail, max_request_bytes=600, max_request_bytes_in_flight=600)

    async def is_handled():
        with pytest.raises(RuntimeError, match="a fault of ours"):
            await client.post([b'{"a": "' + b"x" * 500 + b'"}'])

    for _ in range(5):
        await is_handled()
    for pieces, status in (([b"x" * 500], 400), ([b"[" * 500], 400), ([b"x" * 601], 413), ([b'{"a": NaN}'], 400)):
        for _ in range(3):
            assert (await client.post(pieces))[0] == status
    task = asyncio.create_task(client.post([b"x" * 500], end=False))
    await asyncio.sleep(0.05)
    assert (await client.post([b'{"a": "' + b"x" * 500 + b'"}']))[0] == 429
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await is_handled()


async def test_a_client_that_leaves_is_answered_for_the_metrics_alone():
    """The HTTP server drops the answer; without one its middleware counts a 500."""
    client, sent = Client(), []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/x",
        "query_string": b"",
        "headers": [*JSON, (b"content-length", b"10")],
    }
    await client.app(scope, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 408


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ([(b"content-encoding", b"gzip")], 415, "Content-Encoding 'gzip'"),
        ([(b"content-encoding", b"identity")], 200, None),
        ([(b"content-encoding", b"br, gzip")], 415, "Content-Encoding"),
    ],
)
async def test_bodies_are_taken_as_they_are(headers, status, message):
    answer = await Client().post([b"{}"], headers=headers)
    assert answer[0] == status
    assert message is None or message in message_of(answer)


async def test_a_refusal_waits_only_for_what_is_still_to_come(monkeypatch):
    """A body that is all there is answered at once; of one that is not, a little is taken off the wire."""
    monkeypatch.setattr("casa_serving.endpoint.request_body.DISCARD_TIMEOUT_S", 3600)
    client = Client(max_request_bytes=1000)
    for body in (b'{"a": NaN}', b"oops", b'{"stop": "\\ud800"}'):
        async with asyncio.timeout(30):
            assert (await client.post([body]))[0] == 400
    given = []

    async def pieces():
        for _ in range(1000):
            given.append(100_000)
            yield bytes(100_000)

    async with asyncio.timeout(30):
        assert (await client.post(pieces()))[0] == 413
    assert sum(given) <= 1_200_000


async def test_the_application_gets_the_body_as_it_was_sent():
    body = '{"a":  [1, 2.50, "ä\\u00e4"]}'.encode()
    assert json.loads((await Client().post([body[:7], body[7:]]))[2]) == {"got": body.decode()}
