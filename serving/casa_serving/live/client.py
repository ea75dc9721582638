"""A client of `/v1/live` in Python; needs `websockets` and no engine.

    async with LiveClient("ws://localhost:8000/v1/live") as client:
        await client.create(fps=2)
        await client.send_frame(jpeg_bytes, timestamp=0.0)
        async for event in client.events():
            if event.type == "frame.done":
                print(event.timestamp, event.caption)
                break
        statistics = await client.stop()

The connection is read all the time, whether `events` is iterated or not, so that the server
never finds this client slow. What was said is remembered: after a broken connection,
`reconnect` opens a new session that knows it.
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
# More than any text budget keeps.
MAX_HISTORY_ITEMS = 1024


class ConnectionLostError(ConnectionError):
    """The connection ended without `session.closed`; `LiveClient.reconnect` goes on with a new one."""


class LiveClient:
    """One live session; an async context manager. Not for several tasks, but for `stop` beside `events`.

    Args:
        url: The server's WebSocket.
        api_key: The server's key, if it has one.

    Attributes:
        created: The server's answer to `create`, with the settings in force and the limits.
        statistics: The session's, once it is closed.
        history: What was said, as `session.create` takes it; silent frames are left out.
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
        """Connects."""
        await self._connect()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Closes the connection; a session that was not stopped ends at once."""
        await self._socket.close()
        await self._reader

    async def create(self, **settings: Any) -> Created:
        """Creates the session and waits until it is ready.

        Args:
            **settings: Any of `LiveSettings`' fields, and `history`; the server knows the rest.

        Raises:
            LiveError: the server refuses it, with its code and reason.
            ConnectionLostError: the connection broke.
        """
        history = settings.pop("history", None)
        if history is not None:
            self.history = deque(history, maxlen=MAX_HISTORY_ITEMS)
        self._settings = settings
        message = {"type": "session.create", **settings, "history": list(self.history)}
        with contextlib.suppress(ConnectionLostError):  # Where it was refused at once, the reason is in the events.
            await self._send(json.dumps(message))
        async for event in self.events():
            if isinstance(event, Created):
                self.created = event
                return event
            if isinstance(event, ErrorEvent):
                raise LiveError(event.code, event.message)
        raise ConnectionLostError("The server closed the connection before it created a session.")

    async def send_frame(self, image: bytes, timestamp: float) -> int:
        """Sends a frame and does not wait for its caption.

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
        """Asks a question; returns its `id`, which the events about it carry."""
        id = id or f"question-{len(self._questions)}"
        self._questions[id] = text
        await self._send(Question(text=text, id=id).model_dump_json())
        return id

    async def events(self) -> AsyncIterator[ServerEvent]:
        """Gives what the server sends, in order; ends after `session.closed`.

        Raises:
            ConnectionLostError: the connection broke.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, ConnectionClosed):
                self._events.put_nowait(event)  # For whoever asks again.
                if self.statistics is not None:
                    return
                raise ConnectionLostError(f"The connection broke: {event}.") from event
            yield event

    async def stop(self) -> Statistics:
        """Ends the session after what the server still has in work.

        Events that were not taken yet can still be iterated afterwards.

        Raises:
            ConnectionLostError: the connection broke.
        """
        with contextlib.suppress(ConnectionLostError):
            await self._send(Stop().model_dump_json())
        await self._reader
        if self.statistics is None:
            raise ConnectionLostError("The connection broke before the session was closed.")
        return self.statistics

    async def reconnect(self) -> Created:
        """Opens a new session with the same settings that knows what was said; frames count from 0 again."""
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
        """Takes in events until the connection ends; kinds that a later server may send are passed over."""
        end = ConnectionClosed(None, None)
        try:
            while True:
                event = read_event(await self._socket.recv())
                if event is None:
                    continue
                self._remember(event)
                self._events.put_nowait(event)
        except ConnectionClosed as closed:
            end = closed
        finally:
            self._events.put_nowait(end)  # Whatever happened, nobody waits for ever.

    def _remember(self, event: ServerEvent) -> None:
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
