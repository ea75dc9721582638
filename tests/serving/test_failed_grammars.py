"""A grammar that fails in the engine's process is the client's mistake: 400 on every path, and the engine goes on."""

import json
from types import SimpleNamespace

import pytest

from casa_serving.endpoint.generate_patch import reject_failed_grammars
from casa_serving.endpoint.messages_patch import preserve_stream_errors
from posting import post

pytestmark = pytest.mark.vllm

# A character that is none: no text satisfies it, and vLLM's check of the expression does not see that.
NOTHING = {"structured_outputs": {"regex": "[^\\x00-\\U0010ffff]"}}
FAILED = {
    "no text": NOTHING,
    "rules without an end": {"structured_outputs": {"grammar": "root ::= x\nx ::= y\ny ::= x"}},
    "a forbidden word": {"structured_outputs": {"choice": ["a"]}, "bad_words": ["a"]},
    "forbidden tokens": {"structured_outputs": {"regex": "a"}, "allowed_token_ids": [5]},
}
USER = {"role": "user", "content": "Read."}
PATHS = {
    "/v1/chat/completions": {"messages": [USER], "max_tokens": 6},
    "/v1/chat/completions/batch": {"messages": [[USER], [USER]], "max_tokens": 6},
    "/v1/completions": {"prompt": "Read.", "max_tokens": 6},
    "/v1/responses": {"input": "Read.", "max_output_tokens": 6},
}


def send(server, path, **options):
    return post(server, path, {"model": "casa-tiny-digits", "temperature": 0} | PATHS[path] | options)


@pytest.mark.parametrize("name", FAILED)
def test_a_grammar_that_fails(server, good_request, name):
    expected = good_request()
    status, text = send(server, "/v1/chat/completions", **FAILED[name])
    error = json.loads(text)["error"]
    assert (status, error["type"]) == (400, "BadRequestError"), text
    assert "grammar of the request" in error["message"]
    assert good_request() == expected


@pytest.mark.parametrize("path", PATHS)
def test_every_path(server, path):
    status, text = send(server, path, **NOTHING)
    assert status == 400, text
    assert "grammar of the request" in json.loads(text)["error"]["message"]


@pytest.mark.parametrize("path", [path for path in PATHS if not path.endswith("batch")])
def test_streams_end_with_an_event(server, path):
    """The head has been sent by then; the error is the API's own event, and the stream is complete."""
    status, text = send(server, path, stream=True, **NOTHING)
    assert status == 200
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    error = events[-1] if path.endswith("responses") else events[-1]["error"]
    assert "grammar of the request" in error["message"], text
    assert error["code"] == ("BadRequestError" if path.endswith("responses") else 400)


def test_a_stream_of_messages_ends_with_an_event(server):
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}
    body = {"model": "casa-tiny-digits", "max_tokens": 20, "messages": [USER], "stream": True}
    status, text = post(
        server, "/v1/messages", body | {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    )
    assert status == 200
    last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
    assert (last["type"], last["error"]["type"]) == ("error", "invalid_request_error"), text
    assert "grammar of the request" in last["error"]["message"], text


def test_functions_of_another_kind_are_not_patched():
    with pytest.raises(RuntimeError, match="generate_patch"):
        reject_failed_grammars(SimpleNamespace(generate=lambda prompt, sampling_params, request_id: None))
    with pytest.raises(RuntimeError, match="messages_patch"):
        preserve_stream_errors(SimpleNamespace(message_stream_converter=lambda generator: None))
