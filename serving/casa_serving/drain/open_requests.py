"""The open HTTP requests of a server, and how all of them are ended at shutdown.

Each runs in a task of its own, which can be cancelled at any point: while the body is read, while an image is
processed, in the engine, or while a client does not read. The error (final_messages.py) is sent from here, so that it
does not depend on what the request was doing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from casa_serving.drain.connections import abort_connection
from casa_serving.drain.final_messages import STATUS, end_of_stream, status_and_message, unavailable_response

logger = logging.getLogger("vllm.casa_drain")
# Timeout for a task to be cancelled, and for a client to read its final message.
FINAL_MESSAGE_S = 0.5
INTERNAL_ERROR = 500


class OpenRequests:
    """The HTTP requests of one server process.

    Args:
        fatal_error: Returns the message of an error that the server cannot recover from, or None. After such an error
            the message replaces vLLM's own responses, which differ between its paths, and some have none.
    """

    def __init__(self, fatal_error: Callable[[], str | None]) -> None:
        self._fatal_error = fatal_error
        self._open: set[asyncio.Task[None]] = set()
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def __len__(self) -> int:
        """Return the number of open requests."""
        return len(self._open)

    def end(self, reason: str) -> None:
        """End all open requests, and every later one, with this error message."""
        if not self._ended.done():
            self._ended.set_result(reason)

    async def wait(self, timeout_s: float) -> bool:
        """Wait until no request is open; return False after `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._none_open.wait()
        except TimeoutError:
            return False
        return True

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Run an application for one request until it completes or `end` is called."""
        response = ForwardedResponse(send, scope["path"], self._fatal_error)
        task = asyncio.ensure_future(app(scope, receive, response.forward))
        self._open.add(task)
        self._none_open.clear()
        try:
            await asyncio.wait([task, self._ended], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await self._cancel(task, self._ended.result(), response, scope)
            elif (task.exception() or response.is_ended) and (fatal_error := self._fatal_error()):
                await self._cancel(task, fatal_error, response, scope)
            elif (error := task.exception()) is not None and response.is_open_stream:
                status, message = status_and_message(error)
                logger.error("A stream at %s ends with an error: %s", scope["path"], message, exc_info=error)
                await self._send_final_message(response, message, scope, status)
            else:
                task.result()
        finally:
            task.cancel()
            self._open.discard(task)
            if not self._open:
                self._none_open.set()

    async def _cancel(self, task: asyncio.Task[None], reason: str, response: ForwardedResponse, scope: Scope) -> None:
        response.is_ended = True
        task.cancel()
        await asyncio.wait([task], timeout=FINAL_MESSAGE_S)
        if task.done() and not task.cancelled() and task.exception() is not None:
            logger.debug("A request failed while it was ended.", exc_info=task.exception())
        await self._send_final_message(response, reason, scope)

    async def _send_final_message(
        self, response: ForwardedResponse, reason: str, scope: Scope, status: int = STATUS
    ) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FINAL_MESSAGE_S):
                if await response.send_final_message(reason, status):
                    return
        abort_connection(scope)


class StreamErrors:
    """ASGI middleware of a cluster's replica, which has no `OpenRequests`: sends client errors within a stream.

    Other exceptions are re-raised: the ingress handles the failure of a replica.

    Args:
        app: vLLM's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        response = ForwardedResponse(send, scope["path"], lambda: None)
        try:
            await self._app(scope, receive, response.forward)
        except Exception as error:
            status, message = status_and_message(error)
            if status >= INTERNAL_ERROR or not response.is_open_stream:
                raise
            logger.error("A stream at %s ends with an error: %s", scope["path"], message)
            await response.send_final_message(message, status)


class ForwardedResponse:
    """The response to one request on its way to the client.

    Args:
        send: ASGI's `send` of the client.
        path: Path of the request.
        fatal_error: See `OpenRequests`.
    """

    def __init__(self, send: Send, path: str, fatal_error: Callable[[], str | None]) -> None:
        self._send, self._path, self._fatal_error = send, path, fatal_error
        self._has_begun = self._is_complete = self._is_stream = False
        self._last_body = b""
        self.is_ended = False

    async def forward(self, message: Message) -> None:
        """Forward what the application sends, until the response is ended."""
        is_start = message["type"] == "http.response.start"
        if is_start and message["status"] >= INTERNAL_ERROR and self._fatal_error() is not None:
            self.is_ended = True
        if self.is_ended:
            return
        if is_start:
            self._has_begun = True
            types = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
            self._is_stream = any(value.startswith(b"text/event-stream") for value in types)
        elif message["type"] == "http.response.body":
            self._last_body = message.get("body", b"") or self._last_body
            self._is_complete = not message.get("more_body", False)
        await self._send(message)

    @property
    def is_open_stream(self) -> bool:
        """Whether the response is a stream that has begun and is not complete."""
        return self._has_begun and self._is_stream and not self._is_complete

    async def send_final_message(self, reason: str, status: int = STATUS) -> bool:
        """Send the error that ends the response; return False if the response has begun and is no stream."""
        if self._is_complete:
            return True
        if not self._has_begun:
            for message in unavailable_response(self._path, reason):
                await self._send(message)
        elif self._is_stream:
            await self._send(end_of_stream(self._path, reason, self._last_body, status))
        else:
            return False
        return True
