"""Calls an ASGI application without a connection: a request goes in as a value, its answer comes out in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message

from casa_serving.cluster.forwarded import ForwardedRequest, ResponseHead

# For an application that goes on after its client has left.
LEAVE_TIMEOUT_S = 10.0


async def call_app(app: ASGIApp, request: ForwardedRequest) -> AsyncGenerator[ResponseHead | bytes, None]:
    """Answers a request.

    Closing the generator early is the client leaving: the application is told so, and ends the request.

    Args:
        app: Answers HTTP.
        request: What is asked.

    Yields:
        The head with the first piece of the body, then further pieces.

    Raises:
        Exception: What the application raises before it has answered, or in the middle of its answer.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    body: list[bytes] = [request.body]

    async def receive() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        messages.put_nowait(message)

    task = asyncio.create_task(app(request.scope(), receive, send))
    task.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        start = None
        while (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                start = message
            elif start is not None:
                headers = tuple((bytes(name), bytes(value)) for name, value in start["headers"])
                more = message.get("more_body", False)
                yield ResponseHead(start["status"], headers, message.get("body", b""), not more)
                start = None
            elif piece := message.get("body", b""):
                yield piece
        task.result()
    finally:
        left.set()
        if not task.done():
            # vLLM's handlers listen for the client's leaving; merely cancelled they would leave the request running.
            await asyncio.wait([task], timeout=LEAVE_TIMEOUT_S)
            task.cancel()
