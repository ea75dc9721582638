"""The key that a cluster asks for, in the environment of the process that answers."""

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from casa_serving.cluster.api_key import VARIABLE, ApiKey, key_header


def client():
    """A client of an application with two routes behind the middleware, which is made with the first request."""
    routes = [Route(path, lambda request: PlainTextResponse("here")) for path in ("/v1/models", "/health")]
    app = Starlette(routes=routes)
    app.add_middleware(ApiKey)
    return TestClient(app)


def test_without_a_key_everybody_may_ask(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert client().get("/v1/models").status_code == 200
    assert key_header() == {}


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/models", {}, 401),
        ("/v1/models", {"Authorization": "Bearer other"}, 401),
        ("/v1/models", {"Authorization": "Bearer secret"}, 200),
        ("/health", {}, 200),
    ],
)
def test_with_a_key_it_must_be_shown(monkeypatch, path, headers, status):
    monkeypatch.setenv(VARIABLE, "secret")
    assert client().get(path, headers=headers).status_code == status


def test_our_own_first_request_shows_it(monkeypatch):
    monkeypatch.setenv(VARIABLE, "secret")
    assert client().get("/v1/models", headers=key_header()).status_code == 200
