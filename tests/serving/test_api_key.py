"""The key that a server asks for: of the command line, or in the environment of the process that answers."""

from argparse import Namespace

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from casa_serving.endpoint.api_key import VARIABLE, key_header
from casa_serving.endpoint.request_guard import RequestGuard

pytestmark = pytest.mark.unit

PATHS = ("/v1/models", "/tokenize", "/health", "/web/app.js", "/webs", "/inference/v1/generate")


def client(root_path="", **arguments):
    """A client of an application with these routes behind the guard, which is set up when it is first asked."""
    app = Starlette(routes=[Route(path, lambda request: PlainTextResponse("here")) for path in PATHS])
    app.state.args = Namespace(allowed_origins=[], **arguments)
    app.add_middleware(RequestGuard)
    return TestClient(app, root_path=root_path)


def test_without_a_key_everybody_may_ask(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert client().get("/v1/models").status_code == 200
    assert client().get("/tokenize").status_code == 200
    assert key_header() == {}


@pytest.mark.parametrize("keys", [None, ["secret", "other"]])
@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/models", {}, 401),
        ("/v1/models", {"Authorization": "Bearer wrong"}, 401),
        ("/v1/models", {"Authorization": "Basic secret"}, 401),
        ("/v1/models", {"Authorization": "Bearer secret"}, 200),
        ("/tokenize", {}, 401),
        ("/webs", {}, 401),
        ("/health", {}, 200),
        ("/web/app.js", {}, 200),
    ],
)
def test_with_a_key_it_must_be_shown(monkeypatch, keys, path, headers, status):
    if keys is None:
        monkeypatch.setenv(VARIABLE, "secret")
    answer = client(api_key=keys).get(path, headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "AuthenticationError"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("//health/../v1/models", 401),
        ("/health/../v1/models", 401),
        ("/health/%2e%2e/v1/models", 401),
        ("/web/../v1/models", 401),
        # A file of the page, which has none of this name.
        ("/web/..%2fv1/models", 404),
        ("/%76%31/models", 401),
        ("/v1//models", 401),
        ("/v1/models/", 401),
        ("/v1/models;/health", 401),
        ("/V1/models", 401),
    ],
)
def test_no_other_spelling_of_a_path_gets_around_it(monkeypatch, path, status):
    """They ask for the key, or are no such path; a path that is encoded means what it means decoded."""
    monkeypatch.setenv(VARIABLE, "secret")
    answer = client().get(path, follow_redirects=False)
    assert answer.status_code == status
    assert "here" not in answer.text


@pytest.mark.parametrize(
    "override", ["X-HTTP-Method-Override", "X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Prefix"]
)
def test_headers_do_not_change_what_is_asked_for(monkeypatch, override):
    monkeypatch.setenv(VARIABLE, "secret")
    assert client().get("/v1/models", headers={override: "/health"}).status_code == 401


def test_a_root_path_opens_nothing(monkeypatch):
    """`/inf` is no prefix of `/inference/...` to Starlette's router, and must be none to the guard."""
    monkeypatch.setenv(VARIABLE, "secret")
    headers = {"Authorization": "Bearer secret"}
    assert client("/inf").get("/inference/v1/generate", headers=headers).status_code == 404
    assert client("/api").get("/api/inference/v1/generate", headers=headers).status_code == 404
    assert client("/api").get("/api/v1/models").status_code == 401
    assert client("/api").get("/api/health").status_code == 200
    assert client("/api").get("/api/v1/models", headers=headers).status_code == 200


def test_our_own_first_request_shows_it(monkeypatch):
    monkeypatch.setenv(VARIABLE, "secret")
    assert client().get("/v1/models", headers=key_header()).status_code == 200
