"""Pixels have one entry point: every content part that vLLM knows, on every path that renders messages."""

import json
import socket

import pytest

from image_files import data_url, encoded, plain
from posting import post

pytestmark = pytest.mark.vllm

MODEL = "casa-tiny-digits"
TEXTS = {"text", "thinking", "input_text", "output_text", "refusal", "tool_reference"}
# Paths of `casa-serve` that render messages: where they stand in a body, and what a body needs besides.
PATHS = {
    "/v1/chat/completions": lambda messages: {"messages": messages, "max_tokens": 1},
    "/v1/chat/completions/batch": lambda messages: {"messages": [messages], "max_tokens": 1},
    "/v1/messages": lambda messages: {"messages": messages, "max_tokens": 1},
    "/v1/messages/count_tokens": lambda messages: {"messages": messages},
    "/v1/responses": lambda messages: {"input": messages, "max_output_tokens": 16},
    "/tokenize": lambda messages: {"messages": messages},
    "/invocations": lambda messages: {"messages": messages, "max_tokens": 1},
}


@pytest.fixture(scope="module")
def listener():
    """A socket that must see no connection; the server may download from 127.0.0.1, but not from localhost."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        yield listening
        with pytest.raises(TimeoutError):
            listening.accept()


@pytest.fixture(scope="module")
def orders(listener, tmp_path_factory):
    """What must not be followed, by name: files that are there, one that is not, addresses."""
    image = tmp_path_factory.mktemp("files") / "there.png"
    image.write_bytes(encoded(plain()))
    address = f"http://localhost:{listener.getsockname()[1]}/x.png"
    return {
        "image file": str(image),
        "missing file": str(image.with_name("missing.png")),
        "text file": "/etc/passwd",
        "address": address,
        "file URL": f"file://{image}",
        "list": [[[0, 0, 0], [1, 1, 1]]],
        "mapping": {"url": str(image)},
        "number": 7,
    }


def known_types():
    """Part types of this vLLM that bring something else than text."""
    from vllm.entrypoints.chat_utils import MM_PARSER_MAP

    return sorted(MM_PARSER_MAP.keys() - TEXTS)


def test_every_type_of_part_is_known_here():
    """Fail when a new vLLM takes a new type: then decide whether it is text, or must be refused."""
    from vllm.entrypoints import chat_utils

    assert set(chat_utils.MM_PARSER_MAP) - TEXTS == {
        "image_url",
        "input_image",
        "image_pil",
        "image_embeds",
        "audio_embeds",
        "video_embeds",
        "prompt_embeds",
        "audio_url",
        "input_audio",
        "video_url",
    }
    # Fields by which a part without a type, or with a uuid, brings its content.
    assert chat_utils._KNOWN_CONTENT_PART_FIELDS == {
        *("type", "text", "refusal", "thinking", "closed", "name", "uuid", "data", "file", "prompt_cache_breakpoint"),
        *("image_url", "image_pil", "image_embeds", "audio_url", "input_audio", "audio_embeds"),
        *("video_url", "video_embeds"),
    }


def test_every_modality_of_the_parser_is_known_here():
    from vllm.multimodal.parse import MultiModalDataParser

    assert set(MultiModalDataParser()._get_subparsers()) == {"audio", "image", "video", "vision_chunk"}


def test_every_path_that_renders_messages_is_known_here(server):
    """All paths of the server that take a body with messages, a prompt or an input."""
    schema = json.loads(server.get("/openapi.json"))
    takes = set()
    for path, methods in schema["paths"].items():
        body = methods.get("post", {}).get("requestBody", {})
        names = set(words(body)) | {
            word
            for reference in references(body)
            for word in schema["components"]["schemas"][reference].get("properties", {})
        }
        if names & {"messages", "prompt", "input", "prompts", "text_1", "queries", "query"}:
            takes.add(path)
    rendering = {path for path in takes if not path.endswith(("/render", "/derender")) and "/inference/" not in path}
    texts_only = {"/v1/completions", "/generative_scoring"}
    assert rendering - texts_only <= PATHS.keys(), rendering


def references(node):
    """Names of the schemas that a part of an OpenAPI document refers to."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def words(node):
    """Keys of properties inside a part of an OpenAPI document."""
    if isinstance(node, dict):
        yield from node.get("properties", {})
        for value in node.values():
            yield from words(value)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", known_types())
def test_only_guarded_images_come_in(server, orders, path, kind):
    """Each kind of part with each order: refused shortly, and alike whether a file is there or not."""
    field = {"input_image": "image_url", "prompt_embeds": "data"}.get(kind, kind)
    shapes = [{"type": kind}, {}, {"type": kind, "uuid": "known"}, {"type": "text", "uuid": "known"}]
    # Anthropic's messages hold no such fields: they are not read, so that a text without a text is left.
    for shape in shapes[: 3 if path.startswith("/v1/messages") else 4]:
        answers = {}
        for name, order in orders.items():
            for content in (order, {"url": order}, {"data": order, "format": "wav"}):
                part = {**shape, field: content}
                messages = [{"role": "user", "content": [part, {"type": "text", "text": "Read."}]}]
                status, text = post(server, path, {"model": MODEL, **PATHS[path](messages)})
                assert status in (400, 404, 422), (path, part, status, text[:300])
                # vLLM's models of /v1/responses list every way in which they do not match; not this test's concern.
                assert path == "/v1/responses" or len(text) < 1000
                answers[name, json.dumps(content).replace(json.dumps(order), "ORDER")] = (
                    status,
                    text.replace(json.dumps(order)[1:-1], "ORDER"),
                )
        for content in {content for _, content in answers}:
            assert answers["image file", content] == answers["missing file", content]


@pytest.mark.parametrize("path", ["/v1/completions", "/generative_scoring"])
def test_prompts_in_other_forms(server, orders, path):
    """Fields by which a prompt that is not messages might bring an image."""
    for order in orders.values():
        for prompt in (
            {"prompt": "Read.", "multi_modal_data": {"image": order}},
            {"prompt_token_ids": [1, 2], "multi_modal_data": {"image": [order]}},
        ):
            status, text = post(server, path, {"model": MODEL, "prompt": prompt, "query": prompt, "items": [prompt]})
            assert status in (400, 404, 422), text[:300]
        extra = {"multi_modal_data": {"image": order}, "mm_processor_kwargs": {"images": order}}
        status, text = post(server, path, {"model": MODEL, "prompt": "Read.", "max_tokens": 1, **extra})
        assert status in (200, 400, 404, 422), text[:300]


def test_an_image_goes_through_every_path(server):
    """What is allowed is not rejected with the rest."""
    image = data_url(encoded(plain()))
    for path, body in PATHS.items():
        part = {"type": "image_url", "image_url": {"url": image}}
        if path == "/v1/responses":
            part = {"type": "input_image", "image_url": image, "detail": "auto"}
        if path.startswith("/v1/messages"):
            data = {"type": "base64", "media_type": "image/png", "data": image.partition(",")[2]}
            part = {"type": "image", "source": data}
        text = {"type": "input_text" if path == "/v1/responses" else "text", "text": "Read."}
        status, answer = post(server, path, {"model": MODEL, **body([{"role": "user", "content": [part, text]}])})
        assert status == 200, (path, answer[:500])
