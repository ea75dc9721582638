"""An application called without a connection answers as it would over one, and hears that its client has left."""

import asyncio
from contextlib import aclosing

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from casa_serving.cluster.asgi_call import call_app
from casa_serving.cluster.forwarded import ForwardedRequest, ResponseHead
from waiting import soon

pytestmark = pytest.mark.unit

heard = {}


@pytest.fixture(autouse=True)
def nothing_heard_before():
    """What another test's application has heard proves nothing in this one."""
    heard.clear()


async def echo(request: Request) -> JSONResponse:
    """What came."""
    body = (await request.body()).decode()
    seen = {"path": request.url.path, "query": request.url.query, "body": body, "headers": dict(request.headers)}
    return JSONResponse(seen, 201, {"x-a": "b"}, background=BackgroundTask(heard.__setitem__, "background", True))


async def stream(request: Request) -> StreamingResponse:
    """Many pieces; breaks after one where `?break` is asked for."""

    async def pieces():
        try:
            for number in range(100_000):
                yield f"{number} "
                if request.url.query == "break":
                    raise ArithmeticError("in the middle")
                await asyncio.sleep(0)
        finally:
            heard["stream ended"] = True

    return StreamingResponse(pieces())


async def listen(request: Request) -> JSONResponse:
    """Answer nothing until the client has left, as vLLM's handlers do."""
    heard["listening"] = True
    while (await request.receive())["type"] != "http.disconnect":
        pass
    heard["left"] = True
    return JSONResponse({})


async def fail(request: Request) -> JSONResponse:
    raise ArithmeticError("before anything")


APP = Starlette(
    routes=[
        Route("/echo", echo, methods=["GET", "POST"]),
        Route("/stream", stream),
        Route("/listen", listen),
        Route("/fail", fail),
    ]
)


def request(method, path, query=b"", body=b"", headers=()):
    scope = {"method": method, "path": path, "raw_path": path.encode(), "query_string": query, "headers": headers}
    return ForwardedRequest.from_scope(scope, body)


async def everything(asked):
    return [part async for part in call_app(APP, asked)]


async def test_request_and_answer_pass_unchanged():
    headers = [(b"X-Key", b"v"), (b"content-length", b"999"), (b"transfer-encoding", b"chunked"), (b"x-key", b"w")]
    asked = request("POST", "/echo", b"a=%20b", b"hello", headers)
    (head,) = await everything(asked)
    assert (head.status, head.is_complete) == (201, True)
    assert (b"x-a", b"b") in head.headers
    # The body is whole: what describes the connection would be false.
    assert asked.headers == ((b"x-key", b"v"), (b"x-key", b"w"))
    assert b'"body":"hello"' in head.body
    assert b'"query":"a=%20b"' in head.body
    assert b'"content-length":"5"' in head.body
    assert heard.pop("background")


async def test_what_is_not_there_is_answered_too():
    (head,) = await everything(request("DELETE", "/echo"))
    assert (head.status, head.is_complete) == (405, True)
    (nowhere,) = await everything(request("GET", "/nowhere"))
    assert nowhere.status == 404


async def test_closing_early_is_the_client_leaving():
    async with aclosing(call_app(APP, request("GET", "/stream"))) as parts:
        head = await anext(parts)
        assert isinstance(head, ResponseHead)
        assert not head.is_complete
        assert await anext(parts) == b"1 "
    assert heard.pop("stream ended")


async def test_leaving_before_an_answer_is_the_client_leaving_too():
    task = asyncio.create_task(everything(request("GET", "/listen")))
    await soon(lambda: "listening" in heard)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert heard.pop("left")


async def test_a_fault_is_raised_wherever_it_comes():
    with pytest.raises(ArithmeticError, match="before anything"):
        await everything(request("GET", "/fail"))
    parts = call_app(APP, request("GET", "/stream", b"break"))
    assert (await anext(parts)).body == b"0 "
    with pytest.raises(ArithmeticError, match="in the middle"):
        await anext(parts)
