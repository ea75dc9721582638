"""HTTP and JSON as a real server speaks them: methods, paths, kinds of bodies, odd clients."""

import http.client
import json
import socket
import time
from urllib.parse import urlsplit

import pytest
from websockets.asyncio.client import connect

from image_files import data_url, encoded, plain

pytestmark = pytest.mark.vllm
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
READ = {"type": "text", "text": "Read the digits."}
GOOD = {"model": "casa-tiny-digits", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@pytest.fixture
def send(server):
    """Send a request as it is; return status, headers and body."""

    def request(method, path, body=None, headers=JSON):
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.headers, content

    return request


def speak(server, text):
    """Send bytes on a socket; return everything that comes back until it is closed."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        try:
            connection.sendall(text)
        except (BrokenPipeError, ConnectionResetError):
            pass  # Refused in the middle.
        answer = b""
        try:
            while piece := connection.recv(65_536):
                answer += piece
        except ConnectionResetError:
            pass
    return answer


def error_of(status, headers, content):
    """Return the error of an answer, whose shape is checked."""
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert headers["content-type"] == "application/json"
    return error


@pytest.mark.parametrize("path", ["/health", "/ping", "/v1/models", "/version", "/metrics", "/", "/openapi.json"])
def test_head_where_get_is(send, path):
    got, headers, _ = send("GET", path, headers={})
    status, head, nothing = send("HEAD", path, headers={})
    assert (status, nothing) == (got, b"") == (200, b"")
    assert head.get("content-type") == headers.get("content-type")


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nowhere", 404, None),
        ("POST", "/nowhere", 404, None),
        ("GET", "//v1/models", 404, None),
        ("GET", "/v1/../health", 404, None),
        ("GET", "/web/nowhere", 404, None),
        ("GET", "/v1/models/nowhere", 404, None),
        ("GET", CHAT, 405, "POST"),
        ("HEAD", CHAT, 405, "POST"),
        ("DELETE", "/health", 405, "GET"),
        ("PROPFIND", "/v1/models", 405, "GET"),
        ("GET", "/v1/responses/nowhere", 404, None),
    ],
)
def test_what_is_not_there(send, method, path, status, allow):
    answer = send(method, path, headers={})
    assert answer[0] == status
    assert answer[1]["allow"] == allow
    if method != "HEAD":
        error_of(*answer)


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{oops", JSON, 400, "not JSON"),
        (b"", JSON, 400, "not understood"),
        (b"{}", JSON, 400, "messages: Field required"),
        (b"[]", JSON, 400, "valid dictionary"),
        (b"\xff", JSON, 400, "not UTF-8"),
        (b'{"messages": [], "messages": []}', JSON, 400, "same name twice"),
        (b'{"messages": [], "logit_bias": {"1": NaN}}', JSON, 400, "NaN is no number"),
        (b'{"messages": [], "stop": "\\ud800"}', JSON, 400, "half of a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": [{"uuid": "\\udfff"}]}]}', JSON, 400, "messages.0.content.0.uuid"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "application/json, got 'text/plain'"),
        (b"{}", {}, 415, "application/json"),
        (b"\x1f\x8b", {**JSON, "Content-Encoding": "gzip"}, 415, "Content-Encoding 'gzip'"),
        (b"[" * 1000, JSON, 400, "--max-json-depth"),
        (json.dumps({**GOOD, "n": 129}).encode(), JSON, 400, "'n' is too large: got 129"),
        (json.dumps({**GOOD, "n": 16384}).encode(), JSON, 400, "at most 128"),
        (json.dumps({**GOOD, "chat_template": "{{ 1 }}"}).encode(), JSON, 400, "chat template"),
        (json.dumps({**GOOD, "messages": GOOD["messages"] * 3000}).encode(), JSON, 400, "--max-list-items"),
        (json.dumps({**GOOD, "logprobs": True, "top_logprobs": 20, "max_tokens": 4000}).encode(), JSON, 400, "probab"),
    ],
)
def test_a_bad_body(send, good_request, body, headers, status, message):
    answer = send("POST", CHAT, body, headers)
    assert answer[0] == status
    assert message in error_of(*answer)["message"]
    assert len(answer[2]) < 1000
    assert good_request()


def test_a_byte_order_mark_does_no_harm(send):
    assert send("POST", CHAT, b"\xef\xbb\xbf" + json.dumps(GOOD).encode())[0] == 200


def test_log_probabilities_without_a_length(send):
    status, _, content = send("POST", CHAT, {**GOOD, "logprobs": True, "top_logprobs": 2, "max_tokens": None})
    assert status == 200
    assert len(json.loads(content)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2


def test_models_show_no_path_of_the_server(send):
    listed = json.loads(send("GET", "/v1/models", headers={})[2])["data"]
    assert [model["root"] for model in listed] == ["casa-tiny-digits"]
    one = json.loads(send("GET", "/v1/models/casa-tiny-digits", headers={})[2])
    assert (one["id"], one["root"], one["object"]) == ("casa-tiny-digits", "casa-tiny-digits", "model")


@pytest.mark.parametrize("detail", [{}, {"detail": None}, {"detail": "high"}])
def test_an_image_for_responses_needs_no_detail(server, detail):
    """OpenAI's own example."""
    image = {"type": "input_image", "image_url": data_url(encoded(plain(84, 56))), **detail}
    content = [{"type": "input_text", "text": "Read the digits."}, image]
    answer = server.client().responses.create(
        model="casa-tiny-digits", input=[{"role": "user", "content": content}], max_output_tokens=4
    )
    assert answer.usage.input_tokens > 0


@pytest.mark.parametrize(
    "bad", [{"content": 5, "x": "y"}, {"content": [{"type": "input_image", "detail": "wrong"}]}, {"type": "secret"}]
)
def test_bad_items_for_responses_are_a_short_answer(send, bad):
    items = [{"role": "user", "content": "good"}, *[{"role": "user", "type": "message"} | bad] * 200]
    answer = send("POST", "/v1/responses", {"model": "casa-tiny-digits", "input": items})
    assert answer[0] == 400
    assert "input.1" in error_of(*answer)["message"]
    assert len(answer[2]) < 1000


def test_a_tool_answers_with_text_and_images(send, good_request):
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    image = {"type": "image_url", "image_url": {"url": data_url(encoded(plain(84, 56, "orange")))}}
    for content in ("3 5", [READ], [READ, image]):
        messages = [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": content},
        ]
        status, _, answer = send("POST", CHAT, {**GOOD, "messages": messages})
        assert status == 200, answer
        assert json.loads(answer)["usage"]["prompt_tokens"] > 10
    assert good_request()


def test_http_1_0_and_expectations(server):
    body = json.dumps(GOOD).encode()
    head = b"POST %s HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    assert b" 200 OK\r\n" in speak(server, head % (CHAT.encode(), len(body)) + body)
    head = (
        b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    answer = speak(server, head % (CHAT.encode(), len(body)) + body)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n")
    assert b" 200 OK\r\n" in answer


@pytest.mark.parametrize(
    "headers",
    [
        b"X: " + b"a" * 8_000_000,
        b"".join(b"X-%d: a\r\n" % number for number in range(2000)),
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: -5",
        b"Transfer-Encoding: chunked, identity",
        b"no colon",
    ],
)
def test_headers_that_are_none_or_too_many(server, good_request, headers):
    answer = speak(server, b"POST /tokenize HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n\r\n")
    assert not answer or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431", b"HTTP/1.1 501"))
    assert good_request()


async def test_live_messages_are_not_compressed(server):
    """A client that offers compression is told no: 16 kB could be 16 MB."""
    async with connect(server.live_url, compression="deflate") as client:
        assert not client.protocol.extensions


def test_an_idle_connection_is_kept_longer_than_clients_keep_it(server):
    """OpenAI's client keeps one for 5 s; a server that closes it at that moment loses the next request."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request("GET", "/health")
    assert connection.getresponse().read() == b""
    used = connection.sock
    time.sleep(6)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    assert connection.sock is used
