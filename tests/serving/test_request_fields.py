"""What the fields of a body may hold, on every path alike."""

import pytest

from casa_serving.endpoint.logprobs_bound import bound_logprobs
from casa_serving.endpoint.request_fields import FieldChecker
from casa_serving.errors import RequestError
from casa_serving.options.request_limits import RequestLimits

pytestmark = pytest.mark.unit

LIMITS = RequestLimits(max_list_items=10, max_text_chars=1000, max_n=8, max_schema_chars=100, max_logprobs_values=100)
CHECKER = FieldChecker(LIMITS, max_prompt_chars=500)
IMAGE = "data:image/png;base64," + "A" * 100_000


def deep(value, depth):
    for _ in range(depth):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "a" * 501}, "text of 'prompt' cannot fit into the model's context"),
        ({"prompt": ["a" * 400] * 3}, "1206 characters of text"),
        ({"messages": [{"role": "user", "content": "a" * 501}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a"}] * 11}, "11 items in 'messages'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}] * 11}]}, "11 items in 'messages.0.content'"),
        ({"input": [{"content": [{"type": "input_text", "text": "a" * 501}]}]}, "input.0.content.0.text"),
        # Only in conversations are images; elsewhere they are text.
        ({"prompt": IMAGE}, "cannot fit"),
        ({"tools": [{"url": IMAGE}]}, "cannot fit"),
        ({"messages": [{"content": [{"type": "text", "text": IMAGE}]}]}, "cannot fit"),
        ({"messages": [{"content": [{"image_url": {"url": "http://" + "a" * 501}}]}]}, "cannot fit"),
        ({"messages": [{"content": [{"type": "tool_use", "input": {"data": "A" * 501}}]}]}, "cannot fit"),
        ({"tokens": [1.5] * 11}, "11 items in 'tokens'"),
        ({"tokens": [-1] * 11}, "11 items in 'tokens'"),
        ({"tokens": [2**31] * 11}, "11 items in 'tokens'"),
        ({"tokens": [True] * 11}, "11 items in 'tokens'"),
        ({"a" * 501: 1}, "text of 'body'"),
        ({"metadata": {"a" * 501: 1}}, "cannot fit"),
        ({"n": 9}, "'n' is too large: got 9, at most 8"),
        ({"best_of": 9}, "'best_of' is too large"),
        ({"prompt": ["a"] * 3, "n": 3}, "3 prompts with n=3, at most 8"),
        ({"prompt": [[1], [2], [3], [4]], "n": 3}, "4 prompts with n=3"),
        ({"prompt": ["a"] * 9}, "too many prompts: got 9, at most 8"),
        ({"items": ["a"] * 9}, "too many prompts"),
        ({"messages": [[{"role": "user", "content": "a"}]] * 9}, "too many prompts"),
        ({"stop": ["a"] * 65}, "65 items in 'stop'"),
        ({"structured_outputs": {"regex": "a" * 101}}, "106 characters in 'structured_outputs'"),
        ({"response_format": {"json_schema": {"schema": {"enum": ["a" * 20] * 6}}}}, "in 'response_format'"),
        ({"tools": [{"function": {"name": "a" * 60}}] * 2}, "in 'tools'"),
        (
            {"structured_outputs": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}},
            "refers to itself",
        ),
        ({"vllm_xargs": {"casa_live": "x"}}, "vllm_xargs.casa_live.* is the state of a live session"),
        ({"vllm_xargs": {"casa_live": {"counts": [["a"], [None]]}}}, "state of a live session"),
        ({"vllm_xargs": {"other": 1, "casa_live": None}}, "state of a live session"),
        ({"stop": "\ud800"}, "half of a surrogate pair"),
        ({"stop": ["ok", "\udfff"]}, "stop.1"),
        ({"logit_bias": {"\ud800": 1}}, "half of a surrogate pair"),
        ({"a\ud800": 1}, "half of a surrogate pair"),
        ({"messages": [{"content": [{"uuid": "\ud800"}]}]}, "messages.0.content.0.uuid"),
        ({"logit_bias": {"1": float("inf")}}, "too large"),
        ({"seed": 2**64}, "does not fit into 64 bits"),
        ({"seed": -(2**63) - 1}, "does not fit into 64 bits"),
        (deep({"x": "\ud800"}, 20), "surrogate"),
    ],
)
def test_what_is_over_a_limit(body, message):
    with pytest.raises(RequestError, match=message) as caught:
        CHECKER.check(body)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 500
    str(caught.value).encode()


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a" * 494},
        {"prompt": [1] * 100_000},
        {"prompt": [[1] * 1000] * 8},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}] * 9}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": IMAGE}]}]},
        {"messages": [{"content": [{"type": "image", "source": {"media_type": "image/png", "data": "A" * 10_000}}]}]},
        {"n": 8, "prompt": "a"},
        {"n": 2, "prompt": ["a"] * 4},
        {"n": 2, "prompt": [1, 2, 3, 4, 5, 6, 7, 8, 9]},
        {"vllm_xargs": {"session_id": "casa_live", "other": [1, 2]}},
        {"vllm_xargs": None},
        {"vllm_xargs": "casa_live"},
        {"n": "2", "stop": "\U0001f600", "seed": -(2**63), "text": "a" * 400},
    ],
)
def test_what_is_within_them(body):
    CHECKER.check(body)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"json": {"properties": {f"p{n}": {} for n in range(513)}}}, "names in one object: got 513, at most 512"),
        ({"json": [{f"p{n}": {} for n in range(512)}] * 9}, "names: got 4609, at most 4096"),
        ({"choice": ["c" * 8193] * 2}, "characters in choices, patterns and grammars: got 16386, at most 16384"),
        ({"json": {"type": "string", "pattern": "a" * 20_000}}, "characters in choices"),
        ({"grammar": "a" * 20_000}, "characters in choices"),
    ],
)
def test_schemas_that_take_long_to_compile(schema, message):
    with pytest.raises(RequestError, match=message):
        FieldChecker(RequestLimits()).check({"structured_outputs": schema})


def test_schemas_that_do_not():
    described = {"type": "object", "properties": {"description": {"type": "string", "description": "a" * 50_000}}}
    recursive = {"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"a": {"$ref": "#/$defs/a"}}}}}
    for schema in (described, recursive, {"$ref": "#/nowhere"}, {"$ref": "http://other/"}):
        FieldChecker(RequestLimits()).check({"response_format": {"json_schema": {"schema": schema}}})


CHAT = {"messages": [], "logprobs": True}


@pytest.mark.parametrize(
    "body",
    [
        {**CHAT, "top_logprobs": 9, "max_tokens": 11},
        {**CHAT, "top_logprobs": 9, "max_completion_tokens": 11},
        {**CHAT, "top_logprobs": 9, "max_tokens": 6, "n": 2},
        {"input": "a", "top_logprobs": 9, "max_output_tokens": 11},
        {"prompt": "a", "logprobs": 9, "max_tokens": 11},
        {"prompt": "a" * 11, "logprobs": 9, "echo": True, "max_tokens": 1},
        {"prompt": [1] * 11, "prompt_logprobs": 9, "max_tokens": 1},
        {"prompt": [[1] * 6, [1] * 6], "prompt_logprobs": 9, "max_tokens": 1},
        {"messages": [], "prompt_logprobs": 9},
    ],
)
def test_too_many_log_probabilities(body):
    with pytest.raises(RequestError, match=r"log probabilities.*--max-logprobs-values"):
        bound_logprobs(dict(body), 11, LIMITS)


@pytest.mark.parametrize(
    ("body", "field", "length"),
    [
        ({**CHAT, "top_logprobs": 9}, "max_tokens", 10),
        ({**CHAT, "top_logprobs": 9, "n": 2}, "max_tokens", 5),
        (CHAT, "max_tokens", 50),
        ({"input": "a", "top_logprobs": 9}, "max_output_tokens", 10),
    ],
)
def test_an_answer_of_no_stated_length_gets_one(body, field, length):
    asked = dict(body)
    assert bound_logprobs(asked, 1, LIMITS)
    assert asked == {**body, field: length}


def test_a_length_leaves_room_for_the_prompt():
    """A text has at most as many tokens as characters; where that leaves too little, the client must say."""
    limits = RequestLimits(max_logprobs_values=1000)
    chat = {"messages": [{}], "logprobs": True, "top_logprobs": 9}
    for context, text_chars in ((500, 10), (400, 200)):
        asked = dict(chat)
        assert bound_logprobs(asked, text_chars, limits, context)
        assert asked["max_tokens"] == 100
    assert not bound_logprobs(dict(chat), 10, limits, 100)
    with pytest.raises(RequestError, match="does not set 'max_tokens'"):
        bound_logprobs(dict(chat), 40, limits, 200)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {**CHAT, "top_logprobs": 9, "max_tokens": 10},
        {**CHAT, "top_logprobs": 20, "max_tokens": 4000, "stream": True},
        {"prompt": "a", "logprobs": 5},
        {"prompt": "a", "max_tokens": 100_000},
        {"prompt": "a", "logprobs": "9", "max_tokens": "x"},
    ],
)
def test_other_requests_stay_as_they_are(body):
    asked = dict(body)
    assert not bound_logprobs(asked, 1, LIMITS)
    assert asked == body


def test_limits_that_no_request_could_meet():
    from casa_engine.errors import InputError

    with pytest.raises(InputError, match="--max-n must be a whole number of at least 1, got 0"):
        RequestLimits(max_n=0)
    for seconds in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="--request-read-timeout must be seconds"):
            RequestLimits(request_read_timeout=seconds)
    with pytest.raises(InputError, match="Raise the latter"):
        RequestLimits(max_request_bytes=10, max_request_bytes_in_flight=9)
