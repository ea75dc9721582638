"""A client of `/v1/live` in Python; needs `websockets` and no engine.

    async with LiveClient("ws://localhost:8000/v1/live") as client:
        await client.create(fps=2)
        await client.send_frame(jpeg_bytes, timestamp=0.0)
        async for event in client.events():
            if event.type == "frame.done":
                print(event.timestamp, event.caption)
                break
        statistics = await client.stop()

A background task reads the connection, whether `events` is iterated or not, so that the server
never disconnects this client as slow. Captions and answers are recorded: after a lost connection,
`reconnect` opens a new session with them as its history.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from casa_serving.live.protocol import (
    SUBPROTOCOL,
    TIMESTAMP,
    AnswerDone,
    Closed,
    Created,
    ErrorEvent,
    FrameDone,
    LiveError,
    Question,
    ServerEvent,
    Statistics,
    Stop,
    read_event,
)

DEFAULT_URL = "ws://localhost:8000/v1/live"
# More than any text budget can keep.
MAX_HISTORY_ITEMS = 1024


class ConnectionLostError(ConnectionError):
    """The connection ended without `session.closed`; `LiveClient.reconnect` opens a new one."""


class LiveClient:
    """One live session; an async context manager. Only `stop` and `events` may run in different tasks.

    Args:
        url: The server's WebSocket.
        api_key: The server's key, if it has one.

    Attributes:
        created: The server's response to `create`, with the effective settings and the limits.
        statistics: The session's, once it is closed.
        history: Captions and answers in the format of `session.create`; silent frames are omitted.
    """

    def __init__(self, url: str = DEFAULT_URL, *, api_key: str | None = None) -> None:
        self._url, self._api_key = url, api_key
        self._settings: dict[str, Any] = {}
        self.created: Created | None = None
        self.statistics: Statistics | None = None
        self.history: deque[dict[str, Any]] = deque(maxlen=MAX_HISTORY_ITEMS)
        self._questions: dict[str, str] = {}
        self._num_frames = 0

    async def __aenter__(self) -> Self:
        """Connect."""
        await self._connect()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Close the connection, which also ends a session that was not stopped."""
        await self._socket.close()
        await self._reader

    async def create(self, **settings: Any) -> Created:
        """Create the session and wait until it is ready.

        Args:
            **settings: Any of `LiveSettings`' fields, and `history`; the server has defaults for the others.

        Raises:
            LiveError: The server rejects it, with its code and reason.
            ConnectionLostError: The connection was lost.
        """
        history = settings.pop("history", None)
        if history is not None:
            self.history = deque(history, maxlen=MAX_HISTORY_ITEMS)
        self._settings = settings
        message = {"type": "session.create", **settings, "history": list(self.history)}
        with contextlib.suppress(ConnectionLostError):  # If it was rejected immediately, the reason is in the events.
            await self._send(json.dumps(message))
        async for event in self.events():
            if isinstance(event, Created):
                self.created = event
                return event
            if isinstance(event, ErrorEvent):
                raise LiveError(event.code, event.message)
        raise ConnectionLostError("The server closed the connection before it created a session.")

    async def send_frame(self, image: bytes, timestamp: float) -> int:
        """Send a frame and do not wait for its caption.

        Args:
            image: A JPEG, PNG or WebP file.
            timestamp: Its time in the video, in seconds.

        Returns:
            Its number, which the events about it carry.
        """
        number = self._num_frames
        self._num_frames += 1
        await self._send(TIMESTAMP.pack(timestamp) + image)
        return number

    async def ask(self, text: str, id: str | None = None) -> str:
        """Ask a question; return its `id`, which the events about it carry."""
        id = id or f"question-{len(self._questions)}"
        self._questions[id] = text
        await self._send(Question(text=text, id=id).model_dump_json())
        return id

    async def events(self) -> AsyncIterator[ServerEvent]:
        """Yield the server's events in order; end after `session.closed`.

        Raises:
            ConnectionLostError: The connection was lost.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, ConnectionClosed):
                self._events.put_nowait(event)  # For the next call.
                if self.statistics is not None:
                    return
                raise ConnectionLostError(f"The connection broke: {event}.") from event
            yield event

    async def stop(self) -> Statistics:
        """End the session after the frame and questions that are in progress or queued; return its statistics.

        Events that were not read yet can still be iterated afterwards.

        Raises:
            ConnectionLostError: The connection was lost.
        """
        with contextlib.suppress(ConnectionLostError):
            await self._send(Stop().model_dump_json())
        await self._reader
        if self.statistics is None:
            raise ConnectionLostError("The connection broke before the session was closed.")
        return self.statistics

    async def reconnect(self) -> Created:
        """Open a new session with the same settings and the recorded history; frames are numbered from 0 again."""
        await self._socket.close()
        await self._reader
        await self._connect()
        return await self.create(**self._settings)

    async def _connect(self) -> None:
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else None
        self._socket: ClientConnection = await connect(
            self._url, subprotocols=[SUBPROTOCOL], additional_headers=headers, compression=None
        )
        self._events: asyncio.Queue[ServerEvent | ConnectionClosed] = asyncio.Queue()
        self._questions, self._num_frames = {}, 0
        self.created = self.statistics = None
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        """Read events until the connection ends; types of a later protocol version are ignored."""
        end = ConnectionClosed(None, None)
        try:
            while True:
                event = read_event(await self._socket.recv())
                if event is None:
                    continue
                self._record(event)
                self._events.put_nowait(event)
        except ConnectionClosed as closed:
            end = closed
        finally:
            self._events.put_nowait(end)  # Always, so that `events` never blocks forever.

    def _record(self, event: ServerEvent) -> None:
        if isinstance(event, FrameDone) and event.caption:
            self.history.append({"caption": event.caption, "timestamp": event.timestamp})
        elif isinstance(event, AnswerDone):
            self.history.append({"question": self._questions[event.id], "answer": event.text})
        elif isinstance(event, Closed):
            self.statistics = event.statistics

    async def _send(self, message: str | bytes) -> None:
        try:
            await self._socket.send(message)
        except ConnectionClosed as closed:
            raise ConnectionLostError(f"The connection broke: {closed}.") from closed
