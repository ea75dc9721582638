"""What the first request finds out about a server: another program, a missing key, an error."""

import httpx
import pytest

from casa_engine.errors import InputError
from casa_serving.cluster.warmup import warm_up
from casa_serving.endpoint.api_key import VARIABLE
from web import site

pytestmark = pytest.mark.unit


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    # Nothing listens there: a request through it would fail.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with site() as running:
        yield running


@pytest.mark.parametrize("body", [b"hello", b"[]", b'{"data": []}', b'{"data": null}', b"null"])
def test_another_program_is_named(server, body):
    server.bodies["/v1/models"] = body
    with pytest.raises(InputError, match=r"The server at http://127\.0\.0\.1:\d+ is not casa-engine"):
        warm_up(server.url(""))


def test_a_server_without_the_key_that_is_set_here_is_rejected(server, monkeypatch):
    monkeypatch.setenv(VARIABLE, "secret")
    server.bodies["/v1/models"] = b'{"data": [{"id": "casa"}]}'
    with pytest.raises(InputError, match="VLLM_API_KEY is set here, but not where the ingress runs"):
        warm_up(server.url(""))


@pytest.mark.parametrize("key", [None, "secret"])
def test_an_error_of_the_server_is_passed_on(server, monkeypatch, key):
    if key is not None:
        monkeypatch.setenv(VARIABLE, key)
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        warm_up(server.url(""))


def test_a_server_that_lists_a_model_and_serves_none_is_an_error(server):
    server.bodies["/v1/models"] = b'{"data": [{"id": "casa"}]}'
    # It has no POST.
    with pytest.raises(httpx.HTTPStatusError, match="501"):
        warm_up(server.url(""))


def test_nobody_answers():
    with pytest.raises(httpx.ConnectError):
        warm_up("http://127.0.0.1:9")
