"""Errors are short, in OpenAI's shape, and quote nothing."""

import asyncio
import json
from typing import Literal

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter, ValidationError, model_validator
from starlette.testclient import TestClient

from casa_serving.endpoint.error_shape import MAX_KEPT_BYTES, ErrorShape
from casa_serving.errors import add_error_handlers, describe_validation, error_body, shorten

pytestmark = pytest.mark.unit

SECRET = "sent by the client" * 100


class Text(BaseModel):
    type: Literal["text"]
    text: str


class Image(BaseModel):
    type: Literal["image"]
    image: dict[str, str]


class Message(BaseModel):
    role: str
    content: str | list[Text | Image]


class Request(BaseModel):
    messages: list[Message]


def problems(value):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Request).validate_python(value)
    return caught.value


def test_a_union_is_one_problem_at_the_deepest_field():
    error = problems({"messages": [{"role": "user", "content": [{"type": "text", "text": [SECRET]}]}]})
    message, param = describe_validation(error.errors())
    assert "messages.0.content.0.text: Input should be a valid string" in message
    assert param == "messages.0.content.0.text"
    assert "messages.0.content: " not in message
    assert SECRET[:20] not in message


def test_many_problems_are_counted_and_not_listed():
    message, param = describe_validation(problems({"messages": [{"role": 5}] * 500}).errors())
    assert len(message) < 500
    assert "and 997 more" in message
    assert param == "messages.0.role"


def test_names_that_a_client_has_chosen_are_cut():
    message, _ = describe_validation([{"loc": ("body", "a" * 100_000), "msg": "Field required", "input": SECRET}])
    assert len(message) < 300


def test_texts_of_errors_lose_what_they_quote():
    error = problems({"messages": [{"role": "user", "content": SECRET, "x": 1}, {"role": [SECRET]}]})
    assert "sent by" in str(error)
    assert "sent by" not in shorten(str(error))
    assert shorten("top_p is wrong. (parameter=top_p, value=sent by (the) client)") == "top_p is wrong."
    assert shorten("No grammar: [11:41:34] <path>:4944: Unsupported type") == "No grammar: Unsupported type"
    assert shorten("a" * 10_000_000).endswith("aaa ...")
    assert len(shorten("a" * 10_000_000)) == 2000
    assert json.dumps(error_body(400, "half \ud800")).isascii()


def answer(status, *pieces, content_type=b"application/json"):
    """What a client gets of an answer in pieces."""
    sent = []

    async def send(message):
        sent.append(message)

    async def run():
        shape = ErrorShape(send)
        headers = [(b"content-type", content_type), (b"allow", b"GET"), (b"content-length", b"12345")]
        await shape({"type": "http.response.start", "status": status, "headers": headers})
        for number, piece in enumerate(pieces):
            more = number < len(pieces) - 1
            await shape({"type": "http.response.body", "body": piece, "more_body": more})

    asyncio.run(run())
    headers = dict(sent[0]["headers"])
    body = b"".join(message["body"] for message in sent[1:])
    return headers, body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"detail": [{"loc": ["body"], "input": "..."}]}', "Bad Request"),
        (b"Internal Server Error", "Internal Server Error"),
        (b"", "Bad Request"),
        (b"[1, 2]", "Bad Request"),
        (b'{"error": {"message": 5}}', "Bad Request"),
        (b'{"error": {"message": "as it should be", "type": "T", "param": "p", "code": 1}}', "as it should be"),
    ],
)
def test_every_error_leaves_in_one_shape(body, message):
    headers, got = answer(400, body[:5], body[5:])
    error = json.loads(got)["error"]
    assert error["message"] == message
    assert error["code"] == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert headers[b"content-length"] == str(len(got)).encode()
    assert headers[b"allow"] == b"GET"


def test_a_huge_error_is_not_kept():
    _, got = answer(400, *[b'{"error": {"message": "' + b"a" * 1_000_000] * 20)
    assert len(got) < 200 < MAX_KEPT_BYTES


def test_what_is_no_error_passes_untouched():
    headers, got = answer(200, b"a" * 10, b"b" * 1_000_000, content_type=b"text/plain")
    assert len(got) == 1_000_010
    assert headers[b"content-type"] == b"text/plain"


class Careless(BaseModel):
    """As models of vLLM's do: reads a field before its type was checked."""

    name: str
    fails_later: bool = False

    @model_validator(mode="before")
    @classmethod
    def read_early(cls, data):
        data["name"].strip()
        return data


@pytest.fixture
def careless():
    app = FastAPI()
    add_error_handlers(app)

    @app.post("/")
    async def answer(body: Careless):
        return {}["nothing"] if body.fails_later else {}

    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(("body", "status"), [({"name": 5}, 400), ({}, 400), ({"name": "a", "fails_later": True}, 500)])
def test_a_body_that_trips_its_own_validator_is_the_clients_fault(careless, body, status):
    """And what trips the answer is not."""
    answer = careless.post("/", json=body)
    assert answer.status_code == status
    assert ("not of the kind" in answer.json()["error"]["message"]) == (status == 400)
