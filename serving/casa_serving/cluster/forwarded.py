"""One HTTP request and its response between the ingress and a replica, both unchanged.

Neither is parsed into models on the way. A replica runs the same application as `casa-serve`, so that
requests are validated and responses are formatted in one place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Headers = tuple[tuple[bytes, bytes], ...]
# Headers of the connection to the ingress, which has read the whole body and may have rewritten it.
CONNECTION_HEADERS = frozenset({b"content-length", b"transfer-encoding", b"connection", b"keep-alive", b"expect"})


@dataclass(frozen=True)
class ForwardedRequest:
    """A request with its whole body.

    Attributes:
        method: In upper case.
        path: Decoded.
        raw_path: As received, without the query.
        query_string: What follows `?`, encoded.
        headers: Names in lower case; without those of the connection.
        body: The whole body.
    """

    method: str
    path: str
    raw_path: bytes
    query_string: bytes
    headers: Headers
    body: bytes

    @classmethod
    def from_scope(cls, scope: dict[str, Any], body: bytes) -> ForwardedRequest:
        """Return the request that an ASGI scope describes.

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
        """Return the ASGI scope for the application in the replica."""
        length = (b"content-length", str(len(self.body)).encode())
        return {
            "type": "http",
            # With a version before 2.4, Starlette listens for `http.disconnect`, which `call_app` sends.
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
    """The beginning of a response; further chunks of its body follow as bytes.

    Attributes:
        status: HTTP status.
        headers: As the application sent them.
        body: The first chunk of the body.
        is_complete: Whether it is the whole body.
    """

    status: int
    headers: Headers
    body: bytes
    is_complete: bool
