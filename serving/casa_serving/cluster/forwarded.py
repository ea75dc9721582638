"""What the ingress and a replica send each other for one HTTP request: the request as it came, the answer as it is.

Nothing of either is parsed into models on the way. A replica runs the very application that
`casa-serve` runs, so there is one place that validates requests and one that writes answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Headers = tuple[tuple[bytes, bytes], ...]
# They describe the connection to the ingress; the body has been read there as a whole, and perhaps rewritten.
CONNECTION_HEADERS = frozenset({b"content-length", b"transfer-encoding", b"connection", b"keep-alive", b"expect"})


@dataclass(frozen=True)
class ForwardedRequest:
    """A request with its whole body.

    Attributes:
        method: In capitals.
        path: Decoded.
        raw_path: As it came, without the query.
        query_string: What follows `?`, encoded.
        headers: Names in lower case; without those of the connection.
        body: All of it.
    """

    method: str
    path: str
    raw_path: bytes
    query_string: bytes
    headers: Headers
    body: bytes

    @classmethod
    def from_scope(cls, scope: dict[str, Any], body: bytes) -> ForwardedRequest:
        """Returns the request that an ASGI scope describes.

        Args:
            scope: Of type "http".
            body: Its body.
        """
        path = scope["path"]
        kept = ((name.lower(), value) for name, value in scope["headers"])
        return cls(
            method=scope["method"],
            path=path,
            raw_path=scope.get("raw_path") or path.encode(),
            query_string=scope.get("query_string", b""),
            headers=tuple((name, value) for name, value in kept if name not in CONNECTION_HEADERS),
            body=body,
        )

    def scope(self) -> dict[str, Any]:
        """Returns the ASGI scope for the application in the replica."""
        length = (b"content-length", str(len(self.body)).encode())
        return {
            "type": "http",
            # Before 2.4, Starlette listens for the client's leaving, which is how it is told of it here.
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.raw_path,
            "query_string": self.query_string,
            "root_path": "",
            "headers": [*self.headers, length] if self.body else list(self.headers),
            "client": None,
            "server": None,
            "state": {},
        }


@dataclass(frozen=True)
class ResponseHead:
    """The beginning of an answer; pieces of its body follow as bytes.

    Attributes:
        status: HTTP's.
        headers: As the application wrote them.
        body: The first piece of the body.
        is_complete: Whether that is all.
    """

    status: int
    headers: Headers
    body: bytes
    is_complete: bool
