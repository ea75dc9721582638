"""A live session of a server, as the evaluation needs it: one frame or one question at a time."""

from __future__ import annotations

import json
import struct
from io import BytesIO
from typing import Any, Self

from PIL import Image

from casa_digits.endpoint import TIMEOUT_S, EndpointError

SUBPROTOCOL = "casa-live"


class EndpointStream:
    """One session at `/v1/live`; a context manager. See `runners.Stream`.

    Args:
        base_url: The server's OpenAI-compatible address, such as http://127.0.0.1:8000/v1.
        api_key: The server's key, if it has one.

    Attributes:
        captions: What was said to frames. The default budget of text holds many more frames than are sent here.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self.url = f"ws{base_url.removeprefix('http').rstrip('/')}/live"
        self.api_key = api_key
        self.captions: list[str] = []
        self._num_frames = 0

    def __enter__(self) -> Self:
        """Open the session.

        Raises:
            EndpointError: The server has no live sessions, or no room for this one.
            ModuleNotFoundError: websockets is not installed.
        """
        from websockets.sync.client import connect

        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            self._socket = connect(
                self.url, subprotocols=[SUBPROTOCOL], additional_headers=headers, open_timeout=TIMEOUT_S
            )
        except Exception as error:
            raise EndpointError(
                f"{self.url} opens no live session ({error}). Pass --no-live for a server without any."
            ) from error
        self._socket.send(json.dumps({"type": "session.create"}))
        self._wait("session.created")
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the connection, which ends the session."""
        self._socket.close()

    def caption(self, frame: Image.Image) -> str:
        """Show a frame; see `runners.Stream`."""
        content = BytesIO()
        frame.save(content, "PNG")
        self._socket.send(struct.pack("<d", self._num_frames / 2) + content.getvalue())
        self._num_frames += 1
        said = self._wait("frame.done")["caption"]
        self.captions += [said] if said else []
        return said

    def ask(self, question: str) -> str:
        """Ask between two frames; see `runners.Stream`."""
        self._socket.send(json.dumps({"type": "question", "text": question}))
        return self._wait("answer.done")["text"]

    def _wait(self, kind: str) -> dict[str, Any]:
        """Return the next event of this kind."""
        while True:
            event = json.loads(self._socket.recv(TIMEOUT_S))
            if event["type"] == kind:
                return event
            if event["type"] in ("error", "session.closed"):
                raise EndpointError(f"{self.url} ended the session: {json.dumps(event)[:200]}.")
