"""A live session of a server, as the evaluation needs it: one frame or one question at a time."""

from __future__ import annotations

import json
import struct
from contextlib import ExitStack
from io import BytesIO
from typing import Any, Self

from PIL import Image

from casa_digits.endpoint import TIMEOUT_S, EndpointError, one_line

SUBPROTOCOL = "casa-live"


class EndpointStream:
    """One session at `/v1/live`; a context manager. See `runners.Stream`.

    Args:
        base_url: The server's OpenAI-compatible address, such as http://127.0.0.1:8000/v1.
        api_key: The server's key, if it has one.

    Attributes:
        captions: What was said to frames. The default budget of text holds many more frames than are sent here.

    Raises:
        EndpointError: From every method: the connection or the session ended, or what came is not the protocol.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self.url = f"ws{base_url.removeprefix('http').rstrip('/')}/live"
        self.api_key = api_key
        self.captions: list[str] = []
        self._num_frames = 0
        self._connection = ExitStack()

    def __enter__(self) -> Self:
        """Open the session.

        Raises:
            EndpointError: The server has no live sessions, or no room for this one.
            ModuleNotFoundError: websockets is not installed.
        """
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            self._socket = self._connection.enter_context(
                connect(self.url, subprotocols=[SUBPROTOCOL], additional_headers=headers, open_timeout=TIMEOUT_S)
            )
        except (OSError, WebSocketException) as error:
            raise EndpointError(
                f"{self.url} opens no live session ({one_line(error)}). Pass --no-live for a server without any."
            ) from error
        try:
            self._exchange(json.dumps({"type": "session.create"}), "session.created", "type")
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the connection, which ends the session."""
        self._connection.close()

    def caption(self, frame: Image.Image) -> str:
        """Show a frame; see `runners.Stream`."""
        content = BytesIO()
        frame.save(content, "PNG")
        said = self._exchange(struct.pack("<d", self._num_frames / 2) + content.getvalue(), "frame.done", "caption")
        self._num_frames += 1
        self.captions += [said] if said else []
        return said

    def ask(self, question: str) -> str:
        """Ask between two frames; see `runners.Stream`."""
        return self._exchange(json.dumps({"type": "question", "text": question}), "answer.done", "text")

    def _exchange(self, message: str | bytes, kind: str, field: str) -> str:
        """Send a message; return a field of the next event of this kind."""
        from websockets.exceptions import WebSocketException

        try:
            self._socket.send(message)
            while (event := self._read(self._socket.recv(TIMEOUT_S)))["type"] != kind:
                pass
        except TimeoutError as error:
            raise EndpointError(f"{self.url} sent no event within {TIMEOUT_S:g} s.") from error
        except (OSError, WebSocketException) as error:
            raise EndpointError(f"the connection to {self.url} ended ({one_line(error)}).") from error
        return self._find(event, field)

    def _read(self, content: str | bytes) -> dict[str, Any]:
        """Return an event that says of nothing that it went wrong."""
        try:
            event = json.loads(content)
        except ValueError as error:
            raise self._no_session(content) from error
        kind = self._find(event, "type")
        if kind == "error" and not event.get("fatal"):
            raise EndpointError(f"{self.url} rejects what it was sent: {one_line(self._find(event, 'message'))}")
        if kind in ("error", "session.closed"):
            reason = self._find(event, "message" if kind == "error" else "reason")
            raise EndpointError(f"{self.url} ended the session: {one_line(reason)}")
        return event

    def _find(self, event: Any, field: str) -> str:
        """Return a text of an event."""
        found = event.get(field) if isinstance(event, dict) else None
        if not isinstance(found, str):
            raise self._no_session(event)
        return found

    def _no_session(self, content: Any) -> EndpointError:
        """Return the error for what is not the protocol of live sessions."""
        return EndpointError(
            f"{self.url} is no live session of casa-serve: got {one_line(content)!r}. Pass --no-live for a server "
            "without any."
        )
