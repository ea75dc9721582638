"""A cluster's errors name its own keys."""

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from casa_serving.cluster.config import parse_config
from casa_serving.cluster.setting_names import KEYS, SettingNames, name_keys
from casa_serving.options.live_options import LiveOptions

pytestmark = pytest.mark.unit


def error(message):
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 413}}


async def pieces():
    yield b"--max-image-bytes "
    yield b"--max-image-bytes"


APP = Starlette(
    routes=[
        Route("/error", lambda request: JSONResponse(error("at most 3 (--max-image-bytes), é"), 413, {"x-a": "b"})),
        Route("/good", lambda request: JSONResponse(error("--max-image-bytes"), 200)),
        Route("/text", lambda request: PlainTextResponse("--max-image-bytes", 400)),
        Route("/other", lambda request: JSONResponse({"detail": "--max-image-bytes"}, 400)),
        Route("/stream", lambda request: StreamingResponse(pieces(), 500)),
        # As the HTTP server of a replica answers: the length is that of the body that GET would get.
        Route("/head", lambda request: PlainTextResponse("", 413, {"content-length": "57"}), methods=["HEAD"]),
    ]
)


@pytest.fixture
def get():
    def send(path, method="GET", app=None):
        async def ask():
            transport = httpx.ASGITransport(app or SettingNames(APP))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path)

        return asyncio.run(ask())

    return send


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--max-request-bytes", "ingress.max_request_bytes"),
        ("--max-image-pixels", "images.max_image_pixels"),
        ("--max-pixels-in-flight", "images.max_pixels_in_flight"),
        ("--allowed-media-domains", "images.allowed_media_domains"),
        ("--live-max-frame-bytes", "live.max_frame_bytes"),
        ("--live-idle-timeout", "live.idle_timeout_s"),
        ("--max-model-len", "engine.max_model_len"),
        ("--no-such-option", "--no-such-option"),
        ("a--b", "a--b"),
    ],
)
def test_options_are_translated(option, key):
    assert name_keys(f"At most 5 ({option}).") == f"At most 5 ({key})."


def test_every_key_is_one_of_the_configuration():
    for key in KEYS.values():
        section, name = key.split(".")
        if section != "engine":
            assert name in type(getattr(parse_config({}), section)).model_fields
    assert {name for name in vars(LiveOptions()) if name.startswith("live_")} <= KEYS.keys()


def test_errors_of_one_piece_are_translated_and_measured_anew(get):
    answer = get("/error")
    assert (answer.status_code, answer.headers["x-a"]) == (413, "b")
    assert answer.json() == error("at most 3 (images.max_image_bytes), é")
    assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.parametrize("path", ["/good", "/text", "/other", "/stream"])
def test_whatever_else_stays_as_it_is(get, path):
    assert b"--max-image-bytes" in get(path).content
    assert get(path).content == get(path, app=APP).content


def test_the_head_of_an_error_keeps_the_length_of_its_body(get):
    answer = get("/head", "HEAD")
    assert (answer.status_code, answer.headers["content-length"]) == (413, "57")
