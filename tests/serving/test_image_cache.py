"""Whatever a request is refused for, the next one with the same image is answered; names of images have one owner."""

import json

import pytest

from image_files import data_url, encoded, plain
from posting import post
from serving_process import casa_serve

pytestmark = pytest.mark.vllm

MODEL = "casa-tiny-digits"

FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
# What vLLM refuses only after it has rendered the messages, or may in another version.
REFUSED = {
    "temperature": {"temperature": -1},
    "top_p": {"top_p": 2},
    "top_k": {"top_k": -7},
    "min_p": {"min_p": 3},
    "n": {"n": 0},
    "n greedy": {"n": 2, "temperature": 0},
    "max_tokens": {"max_tokens": 0},
    "max_tokens negative": {"max_tokens": -1},
    "max_tokens too many": {"max_tokens": 10**6},
    "min_tokens": {"min_tokens": 9, "max_tokens": 2},
    "logprobs": {"logprobs": True, "top_logprobs": 10**4},
    "prompt_logprobs": {"prompt_logprobs": 10**4},
    "prompt_logprobs stream": {"prompt_logprobs": 1, "stream": True},
    "stop": {"stop": [""]},
    "stop without text": {"stop": ["x"], "detokenize": False},
    "stop_token_ids": {"stop_token_ids": ["x"]},
    "penalties": {"presence_penalty": 9},
    "frequency": {"frequency_penalty": -9},
    "repetition": {"repetition_penalty": 0},
    "logit_bias": {"logit_bias": {"999999": 1}},
    "logit_bias words": {"logit_bias": {"x": 1}},
    "allowed_token_ids": {"allowed_token_ids": [10**7]},
    "no allowed_token_ids": {"allowed_token_ids": []},
    "bad_words": {"bad_words": [""]},
    "regex": {"structured_outputs": {"regex": "(["}},
    "grammar": {"structured_outputs": {"grammar": "root ::= (("}},
    "choice": {"structured_outputs": {"choice": []}},
    "json": {"structured_outputs": {"json": "{oops"}},
    "two constraints": {"structured_outputs": {"json": {}, "regex": "a"}},
    "response_format": {"response_format": FORMAT},
    "response_format type": {"response_format": {"type": "poem"}},
    "tools": {"tools": [TOOL], "tool_choice": "required"},
    "tool_choice": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    "tool_choice alone": {"tool_choice": "required"},
    "priority": {"priority": 5},
    "model": {"model": "unknown-lora"},
    "seed": {"seed": 2**70},
    "truncate": {"truncate_prompt_tokens": 10**6},
    "beams": {"use_beam_search": True, "n": 10**4},
    "beams with a penalty": {"use_beam_search": True, "stream": True},
    "chat template": {"chat_template": "{{ raise_exception('no') }}"},
    "mm_processor_kwargs": {"mm_processor_kwargs": {"max_pixels": 10}},
    "media_io_kwargs": {"media_io_kwargs": {"image": {"x": 1}}},
    "vllm_xargs": {"vllm_xargs": {"casa_live": "x"}},
    "kv_transfer_params": {"kv_transfer_params": {"do_remote_decode": 5}},
    "thinking budget": {"thinking_token_budget": -5},
    "stream_options": {"stream_options": {"include_usage": True}},
    "echo": {"echo": True, "add_generation_prompt": True, "continue_final_message": True},
}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """A server with two keys and room for a few processed images only."""
    log = tmp_path_factory.mktemp("keyed") / "log.txt"
    arguments = ["--max-model-len", "1024", "--enforce-eager", "--api-key", "one", "two", "--live-max-sessions", "0"]
    arguments += ["--limit-mm-per-prompt", json.dumps({"image": 300}), "--mm-processor-cache-gb", "0.002"]
    with casa_serve(log, *arguments) as running:
        yield running


def image(colour, size=56):
    """Return a data URL of one colour."""
    return data_url(encoded(plain(size, size, colour)))


def part(url, **fields):
    """Return a part with an image, or with a name alone."""
    return {"type": "image_url", "image_url": {"url": url} if url else None, **fields}


def chat(server, *parts, key="one", **options):
    """Return status and answer of a chat."""
    content = [each if isinstance(each, dict) else {"type": "text", "text": each} for each in parts]
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    return post(server, "/v1/chat/completions", body | options, Authorization=f"Bearer {key}")


def seen(server, *parts, **options):
    """Return what distinguishes pictures: the first tokens' log probabilities, exactly."""
    status, text = chat(server, *parts, "Read the digits.", logprobs=True, top_logprobs=5, **options)
    assert status == 200, text
    return json.dumps(json.loads(text)["choices"][0]["logprobs"])


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_request_leaves_nothing_behind(keyed, name):
    """Its image is new to the server, and the next request with it is answered at once."""
    number = list(REFUSED).index(name)
    picture = image((number, 255 - number, 7))
    status, text = chat(keyed, part(picture), "Read.", **REFUSED[name])
    assert status < 500, (name, text)
    status, text = chat(keyed, part(picture), "Read.")
    assert status == 200, (name, text)


def test_most_of_them_are_refused(keyed):
    """A table of requests that are all answered would show nothing."""
    statuses = [chat(keyed, part(image("grey")), "Read.", **options)[0] for options in REFUSED.values()]
    assert sum(400 <= status < 500 for status in statuses) > 25, statuses


def test_a_prompt_that_is_too_long_leaves_nothing_behind(keyed):
    picture = part(image("teal"))
    assert chat(keyed, picture, "word " * 3000)[0] == 400
    assert chat(keyed, picture, "Read.")[0] == 200


def test_more_images_than_the_cache_holds(keyed):
    """2 MB hold three images of 448 x 448; forty in one prompt, twice."""
    parts = [each for number in range(40) for each in (part(image((number, 0, 0), 448)), "x")]
    for _ in range(3):
        status, text = chat(keyed, *parts)
        assert status == 200, text
    assert chat(keyed, *parts, temperature=-1)[0] == 400
    assert chat(keyed, *parts)[0] == 200


def test_bytes_that_were_sent_win(keyed):
    blue, red = seen(keyed, part(image("blue"))), seen(keyed, part(image("red")))
    assert blue != red
    assert seen(keyed, part(image("blue"), uuid="mine")) == blue
    assert seen(keyed, part(image("red"), uuid="mine")) == red
    assert seen(keyed, part(None, uuid="mine")) == red


def test_a_name_belongs_to_a_key_and_a_salt(keyed):
    seen(keyed, part(image("navy"), uuid="private"))
    for options in ({"key": "two"}, {"cache_salt": "other"}):
        status, text = chat(keyed, part(None, uuid="private"), "Read.", **options)
        assert status == 400
        assert "Cache miss for image" in text
    gold = seen(keyed, part(image("gold"), uuid="private"), key="two")
    assert seen(keyed, part(None, uuid="private"), key="two") == gold
    assert seen(keyed, part(None, uuid="private")) != gold


def test_a_name_that_looks_like_a_content_key(keyed):
    """Both vLLM's digest of a file and our own are no names of its content."""
    from vllm.multimodal.hasher import MultiModalHasher

    from casa_serving.endpoint.media import GuardedFileIO
    from casa_serving.options.image_limits import ImageLimits
    from casa_vllm.image_items import content_key

    lime, file = image("lime"), encoded(plain(56, 56, "maroon"))
    guarded = GuardedFileIO(ImageLimits()).load_bytes(file)
    for name in (
        MultiModalHasher.hash_kwargs("blake3", model_id=MODEL, image=file),
        content_key(guarded, MODEL),
    ):
        of_lime = seen(keyed, part(lime, uuid=name))
        assert seen(keyed, part(data_url(file))) != of_lime
        assert chat(keyed, part(None, uuid=name), "Read.", key="two")[0] == 400


@pytest.mark.parametrize("uuid", ["\ud800", "a\udfffb"])
def test_half_a_surrogate_pair_is_no_name(keyed, uuid):
    status, text = chat(keyed, part(image("olive"), uuid=uuid), "Read.")
    assert status == 400
    assert "surrogate" in text


def test_long_and_odd_names(keyed):
    for uuid in ("u" * 1_000_000, "../../etc", "\x00", 7, "ünï"):
        status, text = chat(keyed, part(image("olive"), uuid=uuid), "Read.")
        assert status == 200, text
        assert chat(keyed, part(None, uuid=uuid), "Read.")[0] == 200
