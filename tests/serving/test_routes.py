"""Every route of the real application, known by name: who may ask it, and what a body may cost before it is refused.

The application is vLLM's with our endpoints, so that a route that a new version adds is seen here.
"""

import asyncio
import json
import tracemalloc

import pytest
from starlette.routing import Match
from starlette.testclient import TestClient

from real_app import build_real_app

pytestmark = pytest.mark.vllm
KEY = "secret"
OPEN = {"/health", "/ping", "/metrics", "/", "/web/{name}"}
ASKS_FOR_KEY = {
    "/openapi.json",
    "/docs",
    "/docs/oauth2-redirect",
    "/redoc",
    "/load",
    "/version",
    "/tokenize",
    "/detokenize",
    "/invocations",
    "/generative_scoring",
    "/v1/models",
    "/v1/models/{model_id:path}",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/responses",
    "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/cancel",
    "/v1/live",
}
CLOSED = {
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/inference/v1/generate",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/v1/messages/render",
    "/v1/chat/completions/derender",
    "/v1/completions/derender",
}


@pytest.fixture(scope="module")
def app():
    app = build_real_app("--api-key", KEY)
    # What the endpoint plugin finds out from the engine.
    app.state.max_prompt_chars = 16 * 1024
    return app


@pytest.fixture(scope="module")
def client(app):
    return TestClient(app, raise_server_exceptions=False)


def paths(app):
    return sorted({route.path for route in app.routes})


def requests_of(app):
    """Return (method, path) of every route that speaks HTTP; None stands for all methods."""
    found = set()
    for route in app.routes:
        if hasattr(route, "methods") or not hasattr(route, "endpoint"):
            for method in getattr(route, "methods", None) or {"GET"}:
                found.add((method, route.path.replace("{", "").replace("}", "").replace(":path", "")))
    return sorted(found)


def test_every_route_is_known(app):
    assert set(paths(app)) == OPEN | ASKS_FOR_KEY | CLOSED


def test_without_the_key_only_open_routes_are_answered(app, client):
    open_paths = {path.replace("{name}", "name") for path in OPEN}
    for method, path in requests_of(app):
        answer = client.request(method, path)
        if path in open_paths:
            assert answer.status_code != 401, path
        elif path in CLOSED:
            assert answer.status_code == 404, path
        else:
            assert answer.status_code == 401, path
            assert method == "HEAD" or answer.json()["error"]["type"] == "AuthenticationError"
            assert answer.headers["www-authenticate"] == "Bearer"


def test_closed_routes_are_closed_with_the_key_too(client):
    for path in CLOSED:
        for spelling in (path, f"{path}/", path.replace("e", "%65")):
            answer = client.post(spelling, json={}, headers={"Authorization": f"Bearer {KEY}"})
            assert answer.status_code == 404, spelling


def test_a_websocket_asks_for_the_key(client):
    from starlette.testclient import WebSocketDenialResponse

    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/v1/live"):
        pass
    assert refused.value.status_code == 401


def test_of_a_request_without_the_key_little_is_read_and_nothing_kept(app):
    """A short body is taken off the wire, so that the client sees its answer; an endless one is not."""
    read = []

    async def receive():
        read.append(100_000)
        return {"type": "http.request", "body": b"[" * 100_000, "more_body": True}

    assert asyncio.run(ask(app, "/tokenize", receive, key=None))[0] == 401
    assert sum(read) <= 1_100_000


def worst_bodies(size):
    """Return bodies of `size` bytes that are cheap to send, by name; each must be refused, whatever the route is."""
    return {
        "one text": b'{"prompt": "' + b"a" * size + b'"}',
        "a text in a message": b'{"messages": [{"role": "user", "content": "' + b"a" * size + b'"}]}',
        "escapes": b'{"prompt": "' + b"\\n" * (size // 2) + b'"}',
        "lists": b'{"prompt": [' + b"[]," * (size // 3) + b"[]]}",
        "objects": b'{"messages": [' + b"{}," * (size // 3) + b"{}]}",
        "messages": b'{"messages": [' + b'{"role":"user","content":"a"},' * (size // 30) + b"{}]}",
        "depth": b"[" * size,
        "deep objects": b'{"a":' * (size // 5),
        "token ids": b'{"prompt": [' + b"1," * (size // 2) + b"1]}",
        "fractions": b'{"prompt": [' + b"1.5," * (size // 4) + b"1]}",
        "wrong ids": b'{"tokens": [' + b"-1," * (size // 3) + b"1]}",
        "texts": b'{"prompt": [' + b'"a",' * (size // 4) + b'"a"]}',
        "texts with no commas": b'{"prompt": [' + b'"a"' * (size // 3) + b"]}",
        "names": b"{" + b",".join(b'"%d":1' % number for number in range(size // 9)) + b"}",
        "blanks": b'{"prompt": ' + b" " * (2 * size) + b'"a}',
        "schema": b'{"messages": [], "response_format": {"a": "' + b"a" * size + b'"}}',
        "digits": b'{"prompt": ' + b"1" * size + b"}",
        "no json": b"a" * size,
        "quotes": b'"' * size,
        "backslashes": b'"' + b"\\" * size,
    }


async def ask(app, path, receive, key=KEY, method="POST"):
    """Return status and body of an answer."""
    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked"), (b"host", b"test")]
    if key:
        headers.append((b"authorization", f"Bearer {key}".encode()))
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("test", 1),
        "server": ("test", 1),
        "scheme": "http",
    }
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message["body"] for message in sent[1:])


def in_pieces(body, size=65_536):
    """Return an ASGI `receive` that gives a body as uvicorn does, and counts what it gave."""
    given = [0]

    async def receive():
        if given[0] >= len(body):
            return {"type": "http.disconnect"}
        piece = body[given[0] : given[0] + size]
        given[0] += len(piece)
        return {"type": "http.request", "body": piece, "more_body": given[0] < len(body)}

    return receive, given


def assert_refused(status, answer):
    assert 400 <= status < 500
    assert len(answer) < 1000
    assert json.loads(answer)["error"]["code"] == status


def test_no_route_takes_a_body_that_is_not_bounded(app):
    """Of any path: bodies are read before it is looked at."""
    chances = [(path, body) for path in sorted(ASKS_FOR_KEY - {"/v1/live"}) for body in worst_bodies(600_000).values()]
    for path, body in chances:
        status, answer = asyncio.run(ask(app, path, in_pieces(body)[0]))
        assert_refused(status, answer)


@pytest.mark.parametrize("name", worst_bodies(0))
def test_memory_for_a_body_is_bounded_before_it_is_parsed(app, name):
    """The body itself, twice where its pieces are put together, its text, and the values of its JSON."""
    receive, given = in_pieces(worst_bodies(10_000_000)[name])
    tracemalloc.start()
    status, answer = asyncio.run(ask(app, "/v1/chat/completions", receive))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert_refused(status, answer)
    assert peak < 4 * given[0] + 10_000_000


@pytest.mark.parametrize("name", ["lists", "objects", "depth", "deep objects", "token ids", "texts", "messages"])
def test_structure_is_refused_before_the_body_has_come(app, name):
    receive, given = in_pieces(worst_bodies(10_000_000)[name])
    assert asyncio.run(ask(app, "/v1/chat/completions", receive))[0] == 400
    assert given[0] < 2_000_000


def test_all_routes_with_a_body_are_walked(app):
    """A route that takes another method than POST with a body would not be."""
    taking = {method for method, _ in requests_of(app)} - {"GET", "HEAD", "POST"}
    assert not taking
    scope = {"type": "http", "method": "POST", "path": "/tokenize", "headers": []}
    assert any(route.matches(scope)[0] is Match.FULL for route in app.routes)
