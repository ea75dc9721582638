"""Each row of the tables in docs/limits.md: a request over the limit gets its status, and the option's name."""

import json
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from image_files import data_url, encoded, plain, png_bomb

ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hello"}
GOOD = {"model": "casa-tiny-digits", "messages": [USER], "max_tokens": 2}
MARKER = "<|vision_start|><|image_pad|><|vision_end|>"


def rows():
    """Return (limit, option, answer) of each row of a table of limits."""
    tables = re.findall(r"\| limit \| option \| default \| answer \|\n\|[-|]+\n((?:\|.*\n)+)", limits_page())
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for table in tables for line in table.splitlines()]
    return [(limit, option, answer) for limit, option, _, answer in cells]


def limits_page():
    return (ROOT / "docs" / "limits.md").read_text()


def image(data):
    """Return a chat with a file as its image."""
    return {"messages": [{"role": "user", "content": [part(data), {"type": "text", "text": "Read."}]}]}


def part(data):
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def progressive(num_scans):
    return encoded(plain(), "JPEG", progressive=True) + num_scans * b"\xff\xda"


def schema(value):
    return {"structured_outputs": {"json": value}}


# By the beginning of a row: fields of a chat that is over the limit; or path, body and headers of a request.
OVER = {
    "type, by content": image(b"GIF89a"),
    "bytes of the file": image(encoded(plain()) + bytes(2_000_000)),
    "width x height": image(png_bomb(4096, 4097)),
    "a side": image(png_bomb(16_385, 100)),
    "longer side": image(encoded(plain(1, 201))),
    "scans of a progressive JPEG": image(progressive(101)),
    "images in one request": {"messages": [{"role": "user", "content": [part(encoded(plain()))] * 5}]},
    "bytes of a request's body": (CHAT, b"", {"Content-Length": 12_000_001}),
    "Content-Type": (CHAT, b"{}", {"Content-Type": "text/plain"}),
    "encoding; numbers": (CHAT, b'{"messages": [], "seed": NaN}', {}),
    "arrays and objects inside": (CHAT, b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", {}),
    "values": (CHAT, json.dumps({"prompt": [0] * 262_200}).encode(), {}),
    "arrays and objects; four": (CHAT, json.dumps({"messages": [{}] * 16_384}).encode(), {}),
    "items of an array": {"messages": [USER] * 2049},
    "items of `input`": ("/v1/responses", json.dumps({"model": GOOD["model"], "input": [USER] * 513}).encode(), {}),
    "a header; headers": (CHAT, b"{}", {f"X-{number}": "a" for number in range(300)}),
    "tokens of prompt": {"messages": [{"role": "user", "content": "word " * 2000}]},
    "characters of one text": {"messages": [{"role": "user", "content": "a" * 16_385}]},
    "characters of all texts": {"messages": [{"role": "user", "content": "a" * 16_000}] * 132},
    "answers of a request": {"n": 129},
    "log probabilities": {"logprobs": True, "top_logprobs": 20, "max_tokens": 2000},
    "`stop`": {"stop": ["a"] * 65},
    "characters of a schema": schema({"type": "object", "properties": {n: {"title": "a" * 16_000} for n in "abcde"}}),
    "of these, characters": {"structured_outputs": {"choice": ["a" * 8193, "b" * 8193]}},
    "names in a schema": schema({"type": "object", "properties": {f"p{number}": {} for number in range(513)}}),
    "a chat template": {"chat_template": "{{ 1 }}"},
    "roles": {"messages": [{"role": "alien", "content": "Hello"}]},
    "an image marker": {
        "messages": [{"role": "user", "content": [part(encoded(plain())), {"type": "text", "text": MARKER}]}]
    },
}
# vLLM's own messages, which name what is taken and not the option.
UNNAMED = ("images in one request", "tokens of prompt", "a header; headers")
# Where more than one request is needed, or another server.
ELSEWHERE = {
    "pixels that are decoded": ("test_live_limits", "test_a_session_and_a_chat_share_the_pixels_in_flight"),
    "bytes of all bodies": ("test_half_sent_bodies", "test_bodies_that_are_half_sent"),
    "seconds from a body's first byte": ("test_half_sent_bodies", "test_bodies_that_are_half_sent"),
    "sessions at once": ("test_live_connection", "test_one_session_too_many"),
    "sessions whose text budget": ("test_live_connection", "test_sessions_share_the_memory_of_the_engine"),
    "seconds without a message": ("test_live_limits", "test_silence_ends_a_session"),
    "seconds from the connection": ("test_live_limits", "test_silence_ends_a_session"),
    "seconds that a client does not read": (
        "test_live_limits",
        "test_a_client_that_never_reads_costs_little_and_is_cut_off",
    ),
    "bytes of a frame": ("test_live_connection", '"large frame"'),
    "bytes of a message": ("test_live_server", "1009"),
    "text budget that a client": ("test_live_connection", '"too large a budget"'),
    "characters of a JSON message": ("test_live_connection", '"two megabytes"'),
    "characters of a question": ("test_live_connection", '"long text"'),
    "questions that wait": ("test_live_connection", "only_four_wait"),
    "items of a history": ("test_live_connection", "test_a_history_that_is_too_long"),
    "origin of a page": ("test_live_limits", "test_pages_of_other_origins_are_refused"),
}


def row_of(name):
    """Return the one row that begins so."""
    (found,) = [row for row in rows() if row[0].startswith(name)]
    return found


def send(server, path, body, headers):
    """Return status and text of an answer; a body that is declared and not sent is not waited for."""
    address = urlsplit(server.url)
    fields = {"Host": "x", "Connection": "close", "Content-Type": "application/json", "Content-Length": len(body)}
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in (fields | headers).items())
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(head.encode() + b"\r\n" + body)
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    head, _, text = answer.decode().partition("\r\n\r\n")
    return int(head.split()[1]), text


def test_every_row_has_a_request():
    names = [*OVER, *ELSEWHERE]
    assert len(rows()) > 35
    for limit, _, _ in rows():
        assert sum(limit.startswith(name) for name in names) == 1, limit
    for name in names:
        assert row_of(name)
    for file, text in ELSEWHERE.values():
        assert text in (Path(__file__).parent / f"{file}.py").read_text(), (file, text)


@pytest.mark.vllm
@pytest.mark.parametrize("name", OVER)
def test_what_is_over_a_limit_gets_the_documented_answer(server, good_request, name):
    expected = good_request()
    over = OVER[name]
    path, body, headers = over if isinstance(over, tuple) else (CHAT, json.dumps(GOOD | over).encode(), {})
    status, text = send(server, path, body, headers)
    _, option, answer = row_of(name)
    assert str(status) in answer.split(", "), (status, text)
    if name not in UNNAMED:
        message = json.loads(text)["error"]["message"]
        for documented in re.findall(r"--[a-z0-9-]+", option):
            assert documented in message
    assert good_request() == expected
