"""Reading of request bodies in bounded time and memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Message, Receive

from casa_serving.errors import RequestError
from casa_serving.options.request_limits import RequestLimits

MAX_DISCARDED_BYTES = 1_000_000
DISCARD_TIMEOUT_S = 2.0


class ClientDisconnectedError(Exception):
    """The client left before its body was read."""


async def discard(receive: Receive) -> None:
    """Read and discard the rest of a body, if it is short.

    A connection that is closed with bytes unread is reset, and the client may never see the response.
    """
    num_bytes, more = 0, True
    try:
        async with asyncio.timeout(DISCARD_TIMEOUT_S):
            while more and num_bytes < MAX_DISCARDED_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                more = message.get("more_body", False)
    except TimeoutError:
        return


class BytesInFlight:
    """Counts the bytes of all bodies in memory, in one process.

    Args:
        limit: Largest count.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    def acquire(self, num_bytes: int) -> None:
        """Add bytes to the count.

        Raises:
            RequestError: 429: the limit is reached.
        """
        if self.held + num_bytes > self.limit:
            message = (
                f"The server holds {self.held} bytes of other requests, at most {self.limit} are held at once "
                "(--max-request-bytes-in-flight). Try again after the time in the Retry-After header."
            )
            raise RequestError(429, message, headers={"Retry-After": "1"})
        self.held += num_bytes

    def release(self, num_bytes: int) -> None:
        """Subtract bytes from the count."""
        self.held -= num_bytes


class BodyReader:
    """Reads one body, whose bytes are counted until `release`.

    Args:
        limits: The server's limits.
        in_flight: Counts the bytes of all bodies.

    Attributes:
        is_complete: Whether the whole body has been received.
    """

    def __init__(self, limits: RequestLimits, in_flight: BytesInFlight) -> None:
        self._limits, self._in_flight = limits, in_flight
        self._num_bytes = 0
        self.is_complete = False

    async def read(self, receive: Receive, on_chunk: Callable[[bytes], None]) -> bytes:
        """Read the body.

        Args:
            receive: ASGI's.
            on_chunk: Called with every chunk; an exception ends the reading.

        Raises:
            RequestError: 408, 413, 429: too slow, too large, or too many bytes in flight.
            ClientDisconnectedError: The client has left.
        """
        chunks = []
        timeout_s = self._limits.request_read_timeout
        try:
            async with asyncio.timeout(timeout_s):
                while not self.is_complete:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnectedError
                    chunk = message.get("body", b"")
                    self.is_complete = not message.get("more_body", False)
                    self._count(len(chunk))
                    on_chunk(chunk)
                    chunks.append(chunk)
        except TimeoutError as error:
            message = (
                f"The body did not come in time: got {self._num_bytes} bytes in {timeout_s:g} s "
                "(--request-read-timeout). Send less, or over a faster connection."
            )
            raise RequestError(408, message) from error
        return b"".join(chunks)

    def _count(self, num_bytes: int) -> None:
        if self._num_bytes + num_bytes > self._limits.max_request_bytes:
            raise too_large(f"more than {self._limits.max_request_bytes}", self._limits.max_request_bytes)
        self._in_flight.acquire(num_bytes)
        self._num_bytes += num_bytes

    def release(self) -> None:
        """Release the counted bytes."""
        self._in_flight.release(self._num_bytes)
        self._num_bytes = 0


def too_large(got: str, limit: int) -> RequestError:
    """Return the error for a body over the limit."""
    message = (
        f"The request is too large: got {got} bytes, at most {limit} are taken "
        "(--max-request-bytes). Send fewer or smaller images in one request."
    )
    return RequestError(413, message)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields the body that was read, then the client's further messages."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again
