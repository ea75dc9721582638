"""A server on this machine that answers OpenAI's protocol, or anything else, by a script."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = {"object": "list", "data": [{"id": "served", "object": "model"}]}
MODELS_PATH, CHAT_PATH = "/v1/models", "/v1/chat/completions"


@dataclass(frozen=True)
class Asked:
    """One request."""

    path: str
    key: str | None
    body: Any


@contextmanager
def scripted_endpoint(replies: dict[str, tuple | Callable[[], tuple]]) -> Iterator[tuple[str, list[Asked]]]:
    """Serve `replies` by path: status and body, or what returns both; a body behind which more is announced is cut.

    Yields:
        Its address, and what was asked.
    """
    seen: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append(Asked(self.path, self.headers.get("Authorization"), json.loads(sent or "null")))
            reply = replies.get(self.path, (404, b"<html>Not here</html>"))
            status, body, *cut = reply() if callable(reply) else reply
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body) + sum(cut)))
            # OpenAI's client would try again later, which tells nothing here.
            self.send_header("x-should-retry", "false")
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def answering(*messages: dict[str, Any]) -> Iterator[tuple[str, list[Asked]]]:
    """Serve one model, which says these messages one after the other; see `scripted_endpoint`."""
    rest = iter(messages)
    chat = {CHAT_PATH: lambda: (200, {"choices": [{"message": next(rest)}]})}
    with scripted_endpoint({MODELS_PATH: (200, MODELS), **chat}) as served:
        yield served
