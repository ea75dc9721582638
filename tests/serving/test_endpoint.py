"""What a client of `casa-serve` can use, through OpenAI's own client."""

import contextlib
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from PIL import Image

from casa_serving.engine_defaults import EMBEDDED_NAME
from casa_vllm.metric_names import COUNTERS, GAUGES
from image_files import data_url, encoded, plain
from monitoring import SERVER_BOARD, alert_metrics, board_metrics
from waiting import until
from web import site

pytestmark = pytest.mark.vllm


def part(url, **fields):
    """Return a message part with an image."""
    return {"type": "image_url", "image_url": {"url": url} if url else None, **fields}


def picture(colour="green", size=(84, 56), kind="PNG"):
    """Return the data URL of an image of one colour."""
    return data_url(encoded(plain(*size, colour), kind))


def test_the_model_is_listed(client):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["casa-tiny-digits"]
    assert listed[0].max_model_len == 1024


def test_text_is_answered(ask):
    answer = ask("Hello", max_tokens=5)
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"
    assert ask("Hello", max_tokens=5).choices[0].message.content == answer.choices[0].message.content


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_are_answered(ask, kind):
    answer = ask("Read.", part(picture(kind=kind)))
    assert answer.usage.completion_tokens == 6


def test_images_stand_in_no_text_position(ask):
    """The property that CASA is about, seen from outside: a larger image costs no more tokens."""
    small = ask("Read.", part(picture(size=(28, 28)))).usage.prompt_tokens
    large = ask("Read.", part(picture(size=(560, 560)))).usage.prompt_tokens
    none = ask("Read.").usage.prompt_tokens
    assert small == large
    # The tokens before and after an image; vLLM adds nothing of its own.
    assert large - none == 2


def test_another_image_gives_another_answer(ask):
    noise = data_url(encoded(Image.effect_noise((84, 56), 90).convert("RGB")))

    def logprobs(url):
        answer = ask("Read.", part(url), logprobs=True, max_tokens=1)
        return answer.choices[0].logprobs.content[0].logprob

    assert logprobs(picture("black")) != logprobs(noise)
    assert logprobs(picture("black")) == pytest.approx(logprobs(picture("black")), abs=1e-4)


def test_a_conversation_with_several_images(client):
    first, second = picture("red"), picture("blue")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [part(first), {"type": "text", "text": "Read."}]},
        {"role": "assistant", "content": "1 2"},
        {"role": "user", "content": [{"type": "text", "text": "And"}, part(second), part(first)]},
    ]
    answer = client.chat.completions.create(model="casa-tiny-digits", messages=messages, max_tokens=4)
    without = [
        message | {"content": [item for item in message["content"] if item["type"] == "text"]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]
    text = client.chat.completions.create(model="casa-tiny-digits", messages=without, max_tokens=4)
    assert answer.usage.prompt_tokens - text.usage.prompt_tokens == 3 * 2


def test_streaming_gives_the_same_text(client, ask):
    whole = ask("Count.", part(picture())).choices[0].message.content
    stream = client.chat.completions.create(
        model="casa-tiny-digits",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Count."}, part(picture())]}],
        max_tokens=6,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole
    assert chunks[-1].usage.completion_tokens == 6


def test_logprobs(ask):
    content = ask("Read.", part(picture()), logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 6
    for token in content:
        assert len(token.top_logprobs) >= 3
        assert token.logprob == pytest.approx(max(t.logprob for t in token.top_logprobs), abs=1e-6)
        assert token.logprob < 0


def test_structured_output(ask):
    choices = {"structured_outputs": {"choice": ["yes", "no"]}, "ignore_eos": False}
    choice = ask("?", part(picture()), extra_body=choices)
    assert choice.choices[0].message.content in ("yes", "no")
    pattern = r"[0-9]( [0-9]){2}"
    regex = ask(
        "?", part(picture()), max_tokens=20, extra_body={"structured_outputs": {"regex": pattern}, "ignore_eos": False}
    )
    assert re.fullmatch(pattern, regex.choices[0].message.content)
    schema = {
        "type": "object",
        "properties": {"digit": {"type": "integer", "enum": [3, 7]}},
        "required": ["digit"],
        "additionalProperties": False,
    }
    as_json = ask(
        "?",
        part(picture()),
        max_tokens=40,
        extra_body={"ignore_eos": False},
        response_format={"type": "json_schema", "json_schema": {"name": "d", "schema": schema}},
    )
    assert json.loads(as_json.choices[0].message.content)["digit"] in (3, 7)


def test_an_image_can_be_sent_again_by_its_uuid(ask):
    sent = ask("Read.", part(picture("purple"), uuid="purple-1"))
    again = ask("Read.", part(None, uuid="purple-1"))
    assert again.choices[0].message.content == sent.choices[0].message.content


def test_an_image_from_an_allowed_domain(ask):
    data = encoded(plain(84, 56, "green"))
    with site() as images:
        images.bodies["/green.png"] = data
        answer = ask("Read.", part(images.url("/green.png")))
        assert images.asked == ["/green.png"]
    same = ask("Read.", part(data_url(data)))
    assert answer.choices[0].message.content == same.choices[0].message.content


def test_metrics_are_those_of_prometheus(server, good_request, ask):
    good_request()
    ask("Read.", part(picture()))
    metrics = server.get("/metrics")
    assert re.search(r'vllm:request_success_total\{.*finished_reason="length".*\} [1-9]', metrics)
    labels = f'{{engine="0",model_name="{EMBEDDED_NAME}"}}'
    for name in COUNTERS:
        assert f"# TYPE casa:{name}_total counter\ncasa:{name}_total{labels} " in metrics
    for name in GAUGES:
        assert f"# TYPE casa:{name} gauge\ncasa:{name}{labels} " in metrics
    assert re.search(rf"casa:vision_encoder_runs_total{re.escape(labels)} [1-9]", metrics)


def test_metrics_of_the_board_and_the_alerts_exist(server, good_request):
    good_request()
    exported = set(re.findall(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)[{ ]", server.get("/metrics"), re.MULTILINE))
    # `up` is Prometheus' own.
    assert board_metrics(SERVER_BOARD) | alert_metrics("casa-serve") <= exported | {"up"}


def http_requests(server):
    """Return vLLM's count of requests by status and path; unknown paths are one."""
    found = re.findall(
        r'^http_requests_total\{handler="([^"]*)",method="\w+",status="(\w+)"\} (\S+)', server.get("/metrics"), re.M
    )
    return {(status, path): float(count) for path, status, count in found}


def test_a_client_that_hangs_up_is_no_fault_of_the_server(server):
    before, where = http_requests(server), ("4xx", "/v1/chat/completions")
    address = urllib.parse.urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        time.sleep(0.5)  # The guard reads when the client leaves.
    until(lambda: http_requests(server).get(where, 0) == before.get(where, 0) + 1, 10)
    assert {key: count for key, count in http_requests(server).items() if key[0] == "5xx"} == {
        key: count for key, count in before.items() if key[0] == "5xx"
    }


@pytest.mark.parametrize(
    ("path", "body", "counted"),
    [
        ("/v1/models", None, ("2xx", "/v1/models")),
        ("/v1/chat/completions", b"{", ("4xx", "/v1/chat/completions")),  # the guard's answer
        ("/v1/nothing", None, ("4xx", "none")),
    ],
)
def test_every_request_is_counted_once(server, path, body, counted):
    before = http_requests(server).get(counted, 0)
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(urllib.request.Request(f"{server.url}{path}", data=body), timeout=20).close()
    assert http_requests(server).get(counted, 0) == before + 1


def test_health_is_answered_while_images_are_decoded(server, ask):
    """Decoding 4 images of 16 million pixels takes seconds; none of them on the event loop."""
    large = data_url(encoded(plain(4096, 4096, "red")))
    failures, delays_s = [], []

    def post():
        try:
            while len(delays_s) < 20:
                ask("Read.", part(large), max_tokens=1)
        except Exception as error:  # noqa: BLE001 - the thread hands any failure to the test
            failures.append(error)

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        started = time.perf_counter()
        with urllib.request.urlopen(f"{server.url}/health", timeout=30) as answer:
            assert answer.status == 200
        delays_s.append(time.perf_counter() - started)
        time.sleep(0.02)
    assert not failures
    assert len(delays_s) >= 20
    assert sorted(delays_s)[len(delays_s) // 2] < 0.5
