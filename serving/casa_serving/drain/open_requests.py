"""Which requests are open, and how all of them are ended.

Each runs in a task of its own, which can be cancelled wherever it is: in a body that is still coming, in an image
that is being processed, in the engine, or at a client that does not read. The client gets its last words (last_words)
from here, so that they do not depend on what was under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from casa_serving.drain.connections import abort_connection
from casa_serving.drain.final_messages import STATUS, end_of_stream, failure, refusal

logger = logging.getLogger("vllm.casa_drain")
# For a task to notice that it is cancelled, and for a client to take its last words.
FINAL_MESSAGE_S = 0.5
INTERNAL_ERROR = 500


class OpenRequests:
    """The HTTP requests of one server process.

    Args:
        fault: Says what has broken the server for good, in words, or None: an application that then fails gets no
            word in, since vLLM's own are not the same on all its paths, and on some there are none.
    """

    def __init__(self, fault: Callable[[], str | None]) -> None:
        self._fault = fault
        self._open: set[asyncio.Task[None]] = set()
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def __len__(self) -> int:
        """Returns how many are open."""
        return len(self._open)

    def end(self, reason: str) -> None:
        """Ends all that are open, and every one that should still come, with these words."""
        if not self._ended.done():
            self._ended.set_result(reason)

    async def wait(self, timeout_s: float) -> bool:
        """Waits until none is open; returns whether that came to pass in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._none_open.wait()
        except TimeoutError:
            return False
        return True

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Has an application answer a request, unless all of them are ended before."""
        answer = Answer(send, scope["path"], self._fault)
        task = asyncio.ensure_future(app(scope, receive, answer.pass_on))
        self._open.add(task)
        self._none_open.clear()
        try:
            await asyncio.wait([task, self._ended], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await self._break_off(task, self._ended.result(), answer, scope)
            elif (task.exception() or answer.is_ended) and (fault := self._fault()):
                await self._break_off(task, fault, answer, scope)
            elif (error := task.exception()) is not None and answer.is_open_stream:
                status, message = failure(error)
                logger.error("A stream at %s ends with an error: %s", scope["path"], message, exc_info=error)
                await self._say_last_words(answer, message, scope, status)
            else:
                task.result()
        finally:
            task.cancel()
            self._open.discard(task)
            if not self._open:
                self._none_open.set()

    async def _break_off(self, task: asyncio.Task[None], reason: str, answer: Answer, scope: Scope) -> None:
        answer.is_ended = True
        task.cancel()
        await asyncio.wait([task], timeout=FINAL_MESSAGE_S)
        if task.done() and not task.cancelled() and task.exception() is not None:
            logger.debug("A request failed while it was ended.", exc_info=task.exception())
        await self._say_last_words(answer, reason, scope)

    async def _say_last_words(self, answer: Answer, reason: str, scope: Scope, status: int = STATUS) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FINAL_MESSAGE_S):
                if await answer.say_last_words(reason, status):
                    return
        abort_connection(scope)


class BrokenStreams:
    """ASGI middleware where no `OpenRequests` are, in a cluster's replica: what a client has caused ends its stream.

    Other failures are passed on: the ingress tells one replica's end from another's.

    Args:
        app: vLLM's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Has the application answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = Answer(send, scope["path"], lambda: None)
        try:
            await self._app(scope, receive, answer.pass_on)
        except Exception as error:
            status, message = failure(error)
            if status >= INTERNAL_ERROR or not answer.is_open_stream:
                raise
            logger.error("A stream at %s ends with an error: %s", scope["path"], message)
            await answer.say_last_words(message, status)


class Answer:
    """The response to one request on its way to the client.

    Args:
        send: Where it goes.
        path: Of the request.
        fault: See `OpenRequests`.
    """

    def __init__(self, send: Send, path: str, fault: Callable[[], str | None]) -> None:
        self._send, self._path, self._fault = send, path, fault
        self._has_begun = self._is_complete = self._is_stream = False
        self._last_body = b""
        self.is_ended = False

    async def pass_on(self, message: Message) -> None:
        """Hands on what the application sends, until it is ended."""
        is_start = message["type"] == "http.response.start"
        if is_start and message["status"] >= INTERNAL_ERROR and self._fault() is not None:
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
        """Whether it is a stream that has begun and not ended."""
        return self._has_begun and self._is_stream and not self._is_complete

    async def say_last_words(self, reason: str, status: int = STATUS) -> bool:
        """Tells the client why there is no more; returns False where that cannot be said any more."""
        if self._is_complete:
            return True
        if not self._has_begun:
            for message in refusal(self._path, reason):
                await self._send(message)
        elif self._is_stream:
            await self._send(end_of_stream(self._path, reason, self._last_body, status))
        else:
            return False
        return True
