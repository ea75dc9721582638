"""Each bad request gets a clear 4xx of the right kind, and the next good one is answered."""

import http.client
import json
import re
from urllib.parse import urlsplit

import openai
import pytest
from PIL import Image

from image_files import data_url, encoded, plain, png_bomb
from web import site

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def expected(good_request):
    """What the good request is answered with, before anything bad was sent."""
    return good_request()


@pytest.fixture
def refuses(ask, expected, good_request):
    """Send a bad request and check its status, its words, and that the server is as before."""

    def check(*parts, message, status=400, **options):
        with pytest.raises(openai.APIStatusError) as caught:
            ask(*parts, **options)
        error = caught.value.response.json()["error"]
        assert caught.value.status_code == status, error
        assert re.search(message, error["message"]), error["message"]
        assert_tells_nothing_inside(error["message"])
        assert good_request() == expected

    return check


def assert_tells_nothing_inside(message):
    """Fail if an error shows addresses of objects, tracebacks or files of the server."""
    for secret in ("0x", "BytesIO", "Traceback", "site-packages", "PIL"):
        assert secret not in message


def part(url, **fields):
    """Return a message part with an image."""
    return {"type": "image_url", "image_url": {"url": url} if url else None, **fields}


def image(width=56, height=28, **options):
    """Return a message part with an image of one colour."""
    return part(data_url(encoded(plain(width, height, **options))))


NOISE = encoded(Image.effect_noise((200, 200), 80).convert("RGB"))
BAD_IMAGES = {
    "text": (b"this is not an image", "neither JPEG, PNG nor WebP"),
    "html": (b"<html><body>404</body></html>", "neither JPEG, PNG nor WebP"),
    "gif": (encoded(plain(), "GIF"), "neither JPEG, PNG nor WebP"),
    "empty": (b"", "The image is empty: got 0 bytes"),
    "truncated": (NOISE[: len(NOISE) // 2], "damaged or cut off"),
    "header only": (NOISE[:20], "header is damaged or cut off"),
    "1x5000": (encoded(plain(1, 5000)), "too narrow: got 1 x 5000"),
    "bomb": (png_bomb(20_000, 20_000), "too many pixels"),
    "17 million pixels": (png_bomb(4096, 4097), "got 4096 x 4097"),
    "oversized": (NOISE + bytes(2_000_000), "file is too large"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image(refuses, name):
    data, message = BAD_IMAGES[name]
    refuses("Read.", part(data_url(data)), message=message)


def test_one_pixel_is_an_image(ask, good_request, expected):
    assert ask("Read.", image(1, 1)).usage.completion_tokens == 6
    assert good_request() == expected


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://10.0.0.1/a.png", "private, link-local, loopback or reserved"),
        ("http://169.254.169.254/latest/meta-data/", "private, link-local, loopback or reserved"),
        ("http://[::1]/a.png", "not an allowed domain"),
        ("https://example.org/a.png", "not an allowed domain"),
        ("file:///etc/passwd", "Local files are read only from"),
        ("ftp://127.0.0.1/a.png", "scheme 'ftp'"),
        ("not a url", "scheme"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png,abc", "only base64 data is taken"),
    ],
)
def test_a_bad_url(refuses, url, message):
    refuses("Read.", part(url), message=message)


def test_redirects_to_private_addresses_and_missing_files(refuses):
    with site() as images:
        images.redirects["/private"] = "http://10.0.0.1/a.png"
        images.redirects["/metadata"] = "http://169.254.169.254/latest/meta-data/"
        images.bodies["/text.png"] = b"no image"
        images.bodies["/big.png"] = bytes(2_000_001)
        refuses("Read.", part(images.url("/private")), message="private, link-local")
        refuses("Read.", part(images.url("/metadata")), message="private, link-local")
        refuses("Read.", part(images.url("/text.png")), message="neither JPEG, PNG nor WebP")
        refuses("Read.", part(images.url("/big.png")), message="more than 2000000 bytes")
        refuses("Read.", part(images.url("/none.png")), message="HTTP status 404", status=422)


def test_too_many_images(refuses):
    refuses("Read.", *[image()] * 5, message="At most 4 image")


def test_a_prompt_too_long(refuses):
    refuses("word " * 2000, message="model's maximum context length is 1024 tokens")


def test_an_unknown_role(client, good_request, expected):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="casa-tiny-digits", messages=[{"role": "alien", "content": "Hello"}], max_tokens=4
        )
    assert "alien" in caught.value.message
    assert good_request() == expected


def test_an_unknown_model(client, good_request, expected):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "Hi"}])
    assert good_request() == expected


@pytest.mark.parametrize("kind", ["video_url", "audio_url", "hologram"])
def test_what_is_neither_text_nor_image(refuses, kind):
    refuses(
        "Read.", {"type": kind, kind: {"url": "data:video/mp4;base64,AAAA"}}, message=f"type '{kind}' and is neither"
    )


def test_an_unknown_uuid(refuses):
    refuses("Read.", part(None, uuid="never-sent"), message="Cache miss for image")


def test_an_image_marker_written_as_text(refuses, ask, good_request, expected):
    marker = "Look: <|vision_start|><|image_pad|><|vision_end|>"
    refuses(marker, image(), message="2 image markers and 1 images")
    # Without any image nothing looks for markers: it is a token like any other.
    assert ask(marker).usage.completion_tokens == 6
    assert good_request() == expected


def test_requests_cannot_lift_the_limits(refuses):
    fields = {"media_io_kwargs": {"image": {"max_image_pixels": 10**12}}}
    refuses("Read.", image(), message="`media_io_kwargs` is not taken from requests", extra_body=fields)
    fields = {"mm_processor_kwargs": {"min_pixels": 10**9, "max_pixels": 10**10}}
    refuses("Read.", image(), message="mm_processor_kwargs .'max_pixels', 'min_pixels'. are given", extra_body=fields)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_body_too_large(server, chunked, good_request, expected):
    """Declared or not, a body over the limit is refused before all of it was read."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    body = b'{"model": "casa-tiny-digits", "messages": "' + bytes(12_000_000) + b'"}'
    pieces = (body[at : at + 65536] for at in range(0, len(body), 65536))
    try:
        connection.request(
            "POST",
            "/v1/chat/completions",
            body=pieces if chunked else body,
            headers={"Content-Type": "application/json"},
            encode_chunked=chunked,
        )
    except (BrokenPipeError, ConnectionResetError):
        pass  # The server answered and closed while we were still sending.
    answer = connection.getresponse()
    assert answer.status == 413
    assert "--max-request-bytes" in json.loads(answer.read())["error"]["message"]
    connection.close()
    assert good_request() == expected


def test_a_body_that_is_no_json(server, good_request, expected):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    connection.request("POST", "/v1/chat/completions", b"{oops", {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 400
    assert "not JSON" in json.loads(answer.read())["error"]["message"]
    connection.close()
    assert good_request() == expected


@pytest.mark.parametrize("path", ["/inference/v1/generate", "/scale_elastic_ep", "/v1/chat/completions/render"])
def test_doors_for_other_servers_are_closed(server, path):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    connection.request("POST", path, b"{}", {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 404
    assert path in json.loads(answer.read())["error"]["message"]
    connection.close()
