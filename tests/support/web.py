"""A small web server on this machine that images are downloaded from in tests."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site(ThreadingHTTPServer):
    """Serves fixed bodies and redirects by path, and remembers which paths were asked for.

    Attributes:
        bodies: Path to the bytes that it answers.
        redirects: Path to the URL that it redirects to.
        slow: Paths that are answered after two seconds.
        asked: Paths asked for, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.slow: set[str] = set()
        self.asked: list[str] = []

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """Return the address of a path under one of this machine's names."""
        return f"http://{host}:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    """Answers one request of a `Site`."""

    server: Site

    def do_GET(self) -> None:
        """Answer a body, a redirect or 404."""
        self.server.asked.append(self.path)
        if self.path in self.server.slow:
            time.sleep(2)
        if self.path in self.server.redirects:
            self.send_response(302)
            self.send_header("Location", self.server.redirects[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = self.server.bodies.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        # A client that breaks off is a case under test.
        try:
            self.wfile.write(body or b"")
        except ConnectionError:
            return

    def log_message(self, *args: object) -> None:
        """Keep the tests' output clean."""


@contextmanager
def site() -> Iterator[Site]:
    """Run a `Site` on a free port."""
    server = Site()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
