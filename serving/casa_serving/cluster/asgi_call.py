"""Calls an ASGI application without a connection: takes a request as a value and yields the response in chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message

from casa_serving.cluster.forwarded import ForwardedRequest, ResponseHead

# For an application to return after `http.disconnect`.
DISCONNECT_TIMEOUT_S = 10.0


async def call_app(app: ASGIApp, request: ForwardedRequest) -> AsyncGenerator[ResponseHead | bytes, None]:
    """Run an application for one request.

    Closing the generator early is a disconnect of the client: the application gets `http.disconnect`.

    Args:
        app: The ASGI application.
        request: The request.

    Yields:
        The head with the first chunk of the body, then further chunks.

    Raises:
        Exception: Whatever the application raises, before or during its response.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    disconnected = asyncio.Event()
    body: list[bytes] = [request.body]

    async def receive() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await disconnected.wait()
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
            elif chunk := message.get("body", b""):
                yield chunk
        task.result()
    finally:
        disconnected.set()
        if not task.done():
            # vLLM's handlers abort the request at `http.disconnect`; cancelled alone they would leave it running.
            await asyncio.wait([task], timeout=DISCONNECT_TIMEOUT_S)
            task.cancel()
