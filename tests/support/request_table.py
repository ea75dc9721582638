"""Requests, good and bad, that every server of this package must answer alike.

Each is sent as bytes to a real server; `comparable` takes from an answer what may differ between two
servers that do the same: ids, times, and what HTTP says about the connection.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

from image_files import data_url, encoded, plain

MODEL = "casa-tiny-digits"
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
JSON = {"content-type": "application/json"}
# A character that is none: vLLM's check of the expression does not see that no text satisfies it.
UNSATISFIABLE = {"regex": "[^\\x00-\\U0010ffff]"}
# Differ from one answer to the next of the same server; the last one from one start to the next.
VOLATILE = frozenset({"id", "created", "created_at", "completed_at", "request_id", "item_id", "system_fingerprint"})
# Of the Responses API: a piece of text, of which there are as many as there were steps, and their numbers.
TEXT_DELTA = "response.output_text.delta"
# Of the connection, of the moment, and of the hop through Ray Serve, whose proxy names every request.
HOP_HEADERS = frozenset({"date", "server", "connection", "content-length", "transfer-encoding", "x-request-id"})


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        name: Of the test.
        method: HTTP's.
        path: With its query.
        body: What is sent.
        headers: Beside those of the client.
        status: What both servers must answer; 0 where only their agreement is asked for.
    """

    name: str
    method: str = "POST"
    path: str = CHAT
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    status: int = 0

    def send(self, client: httpx.Client) -> httpx.Response:
        """Send it."""
        return client.request(self.method, self.path, content=self.body, headers=self.headers)


def post(name: str, path: str, body: Any, status: int = 0, **headers: str) -> Case:
    """Return a POST of a JSON body."""
    return Case(name, "POST", path, json.dumps(body).encode(), {**JSON, **headers}, status)


def chat(name: str, *parts: Any, status: int = 0, **options: Any) -> Case:
    """Return a chat request whose one message has these parts; options of None take a field away."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    return post(name, CHAT, without_none({**body, **options}), status)


def completion(name: str, status: int = 0, **options: Any) -> Case:
    """Return a request for a completion."""
    body = {"model": MODEL, "prompt": "Read the digits.", "max_tokens": 4, "temperature": 0}
    return post(name, COMPLETIONS, without_none({**body, **options}), status)


def responses(name: str, status: int = 0, **options: Any) -> Case:
    """Return a request of the Responses API."""
    body = {"model": MODEL, "input": "Read the digits.", "max_output_tokens": 4, "temperature": 0}
    return post(name, RESPONSES, without_none({**body, **options}), status)


def without_none(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body without the fields that are None; `NULL` stands for JSON's null."""
    return {name: None if value is NULL else value for name, value in body.items() if value is not None}


NULL = object()


def image(url: str, **fields: Any) -> dict[str, Any]:
    """Return an image part."""
    return {"type": "image_url", "image_url": {"url": url}, **fields}


def message(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    """Return a message."""
    return {"role": role, "content": content, **fields}


def picture(color: str = "orange", format: str = "PNG") -> str:
    """Return the data URL of a plain picture."""
    return data_url(encoded(plain(84, 56, color), format))


def large_picture() -> str:
    """Return the data URL of an image of some 400 kB, which Ray passes by another way than small values."""
    pixels = np.random.default_rng(1005).integers(0, 256, (320, 320, 3), dtype=np.uint8)
    return data_url(encoded(Image.fromarray(pixels)))


def schema(**fields: Any) -> dict[str, Any]:
    """Return a `response_format` with a JSON schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": fields}}


def tool(name: str = "look") -> dict[str, Any]:
    """Return a tool."""
    parameters = {"type": "object", "properties": {"what": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def good_cases() -> list[Case]:
    """Return requests that are answered."""
    red, blue, large = picture("red"), picture("blue", "JPEG"), large_picture()
    read = "Read the digits."
    return [
        chat("text", read, status=200),
        chat("text as a string", messages=[message("user", read)], status=200),
        chat("image", image(red), read, status=200),
        chat("two images", image(red), image(blue), read, status=200),
        chat("one image twice", image(red), read, image(red), status=200),
        chat("large image", image(large), read, status=200),
        chat("image with uuid", image(red, uuid="red one"), read, status=200),
        chat("image with uuid again", image(red, uuid="red one"), read, status=200),
        chat("image with detail", {"type": "image_url", "image_url": {"url": red, "detail": "low"}}, read, status=200),
        chat("stream", image(red), read, stream=True, status=200),
        chat("stream with usage", read, stream=True, stream_options={"include_usage": True}, status=200),
        chat(
            "stream with usage all along",
            read,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
            status=200,
        ),
        chat("stream with logprobs", read, stream=True, logprobs=True, top_logprobs=2, status=200),
        chat("stream of two", read, stream=True, n=2, seed=1, temperature=0.5, status=200),
        chat("logprobs", read, logprobs=True, top_logprobs=3, status=200),
        chat("logprobs without top", read, logprobs=True, status=200),
        chat("logprobs off", read, logprobs=False, status=200),
        chat("prompt logprobs", read, prompt_logprobs=1, status=200),
        chat("two answers", read, n=2, seed=2, temperature=0.5, status=200),
        chat("two greedy answers", read, n=2, status=400),
        chat("seed", read, seed=7, temperature=1.0, status=200),
        chat("stop", read, stop=["1", "2"], status=200),
        chat("stop as a string", read, stop="1", status=200),
        chat("logit bias", read, logit_bias={"5": 50}, status=200),
        chat("penalties", read, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1, status=200),
        chat("top k and p", read, top_k=5, top_p=0.5, min_p=0.1, seed=3, temperature=0.8, status=200),
        chat("ignore eos", read, ignore_eos=True, min_tokens=4, status=200),
        chat("token ids", read, return_token_ids=True, status=200),
        chat("tokens as ids", read, logprobs=True, return_tokens_as_token_ids=True, status=200),
        chat("max_completion_tokens", read, max_tokens=None, max_completion_tokens=2, status=200),
        chat("schema", read, max_tokens=60, response_format=schema(type="object", properties={}), status=200),
        chat("json object", read, max_tokens=8, response_format={"type": "json_object"}, status=200),
        chat("response format text", read, response_format={"type": "text"}, status=200),
        chat("choice", read, structured_outputs={"choice": ["one", "two"]}, status=200),
        chat("regex", read, structured_outputs={"regex": "[0-9]{2}"}, status=200),
        chat("user and metadata", read, user="me", metadata={"a": "b"}, status=200),
        chat("echo", read, echo=True, add_generation_prompt=True, status=200),
        chat("unknown field", read, no_such_field=1, status=200),
        chat("no model", read, model=None, status=200),
        chat("tools", read, tools=[tool()], status=200),
        chat("tools with choice none", read, tools=[tool()], tool_choice="none", status=200),
        chat("tool_choice none without tools", read, tool_choice="none"),
        chat("cache salt", read, cache_salt="salt", status=200),
        chat("priority 0", read, priority=0, status=200),
        chat("chat template arguments", read, chat_template_kwargs={"a": 1}),
        # No text satisfies the grammar, which shows in the engine only: of a stream the head has been sent by then.
        chat("stream of a grammar that fails", read, stream=True, structured_outputs=UNSATISFIABLE, status=200),
        completion("completion stream of such", stream=True, structured_outputs=UNSATISFIABLE, status=200),
        responses("responses stream of such", stream=True, structured_outputs=UNSATISFIABLE, status=200),
        chat("request id", read, request_id="mine", status=200),
        chat("system, user, assistant", messages=conversation(), status=200),
        chat("developer", messages=[message("developer", "Be short."), message("user", read)]),
        chat("tool results", messages=[*conversation(), message("tool", "7", tool_call_id="x")]),
        chat("named", messages=[message("user", read, name="ann")], status=200),
        chat("blank text", "", status=200),
        completion("completion", status=200),
        completion("completion of tokens", prompt=[5, 6, 7], status=200),
        completion("completions of two prompts", prompt=["one", "two"], status=200),
        completion("completions of two token lists", prompt=[[5, 6], [7]], status=200),
        completion("completion stream", stream=True, status=200),
        completion("completion stream with usage", stream=True, stream_options={"include_usage": True}, status=200),
        completion("completion echo", echo=True, status=200),
        completion("completion logprobs", logprobs=2, status=200),
        completion("completion best of", n=2, best_of=2),
        completion("completion suffix", suffix="x"),
        completion("completion without tokens", max_tokens=0, echo=True),
        responses("responses", status=200),
        responses("responses stream", stream=True, status=200),
        responses("responses with instructions", instructions="Be short.", status=200),
        responses("responses items", input=[message("user", "Read.")], status=200),
        responses("responses image", input=[message("user", response_parts(red))], status=200),
        post("tokenize", TOKENIZE, {"model": MODEL, "prompt": "one two"}, 200),
        post("tokenize with tokens", TOKENIZE, {"prompt": "one", "return_token_strs": True}, 200),
        post("tokenize without special tokens", TOKENIZE, {"prompt": "one", "add_special_tokens": False}, 200),
        post("tokenize messages", TOKENIZE, {"messages": [message("user", "one")]}, 200),
        post("tokenize image", TOKENIZE, {"messages": [message("user", [image(red)])]}, 200),
        post("detokenize", DETOKENIZE, {"model": MODEL, "tokens": [5, 6, 7]}, 200),
        post("detokenize nothing", DETOKENIZE, {"tokens": []}),
        post("invocations", "/invocations", {"messages": [message("user", "one")], "max_tokens": 2, "temperature": 0}),
        post(
            "anthropic messages",
            "/v1/messages",
            {"model": MODEL, "max_tokens": 3, "messages": [message("user", "one")], "temperature": 0},
        ),
        Case("models", "GET", "/v1/models", status=200),
        Case("one model", "GET", f"/v1/models/{MODEL}"),
        Case("version", "GET", "/version", status=200),
        Case("health", "GET", "/health", status=200),
        Case("ping", "GET", "/ping", status=200),
        Case("ping by post", "POST", "/ping", status=200),
        Case("page", "GET", "/", status=200),
        Case("head of the page", "HEAD", "/", status=200),
        Case("a file of the page", "GET", "/web/index.html", status=200),
        Case("no file of the page", "GET", "/web/nothing.js", status=404),
        Case("the model of the page", "GET", "/web/model.json", status=200),
        Case("openapi", "GET", "/openapi.json"),
    ]


def conversation() -> list[dict[str, Any]]:
    """Return messages of three roles."""
    return [
        message("system", "Be short."),
        message("user", "Read the digits."),
        message("assistant", "1 2"),
        message("user", "Again."),
    ]


def response_parts(url: str) -> list[dict[str, Any]]:
    """Return parts of the Responses API."""
    return [{"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": "Read."}]


def bad_cases() -> list[Case]:
    """Return requests that are refused."""
    red, read = picture("red"), "Read the digits."
    fields = {
        "temperature -1": {"temperature": -1},
        "temperature text": {"temperature": "hot"},
        "temperature 10**400": {"temperature": 10**400},
        "top_p 2": {"top_p": 2},
        "top_p 0": {"top_p": 0},
        "top_k -5": {"top_k": -5},
        "min_p 3": {"min_p": 3},
        "n 0": {"n": 0},
        "n -1": {"n": -1},
        "n text": {"n": "many"},
        "n 100000": {"n": 100_000},
        "a grammar that fails": {"structured_outputs": UNSATISFIABLE},
        "n 2 without sampling and stream": {"n": 2, "stream": True, "best_of": 1},
        "max_tokens 0": {"max_tokens": 0},
        "max_tokens -1": {"max_tokens": -1},
        "max_tokens 1.5": {"max_tokens": 1.5},
        "max_tokens too many": {"max_tokens": 10**7},
        "max_tokens 2**70": {"max_tokens": 2**70},
        "min_tokens above max_tokens": {"min_tokens": 9},
        "presence_penalty 9": {"presence_penalty": 9},
        "frequency_penalty -9": {"frequency_penalty": -9},
        "repetition_penalty 0": {"repetition_penalty": 0},
        "seed text": {"seed": "x"},
        "seed 2**80": {"seed": 2**80},
        "stop number": {"stop": 3},
        "stop empty": {"stop": [""]},
        "stop_token_ids text": {"stop_token_ids": ["a"]},
        "logit_bias out of range": {"logit_bias": {"99999999": 1}},
        "logit_bias no token": {"logit_bias": {"abc": 1}},
        "logit_bias list": {"logit_bias": [1]},
        "stream text": {"stream": "perhaps"},
        "stream_options without stream": {"stream_options": {"include_usage": True}},
        "stream_options text": {"stream": True, "stream_options": "usage"},
        "top_logprobs without logprobs": {"top_logprobs": 2},
        "top_logprobs -5": {"logprobs": True, "top_logprobs": -5},
        "top_logprobs text": {"logprobs": True, "top_logprobs": "2"},
        "top_logprobs 100": {"logprobs": True, "top_logprobs": 100},
        "logprobs number": {"logprobs": 3},
        "prompt_logprobs with stream": {"prompt_logprobs": 1, "stream": True},
        "prompt_logprobs -7": {"prompt_logprobs": -7},
        "prompt_logprobs 1000": {"prompt_logprobs": 1000},
        "tools empty": {"tools": []},
        "tools number": {"tools": 3},
        "tools without a name": {"tools": [{"type": "function", "function": {}}]},
        "tool_choice auto without tools": {"tool_choice": "auto"},
        "tool_choice required without tools": {"tool_choice": "required"},
        "tool_choice of no tool": {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "no"}}},
        "tool_choice by name": {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "look"}}},
        "tool_choice nonsense": {"tools": [tool()], "tool_choice": "sometimes"},
        "two constraints": {"structured_outputs": {"regex": "1", "choice": ["1"]}},
        "no constraint": {"structured_outputs": {}},
        "constraint of no kind": {"structured_outputs": {"poem": "x"}},
        "bad regex": {"structured_outputs": {"regex": "["}},
        "bad grammar": {"structured_outputs": {"grammar": "root :: ?"}},
        "choice empty": {"structured_outputs": {"choice": []}},
        "bad schema": {"response_format": schema(type="nonsense")},
        "response_format without schema": {"response_format": {"type": "json_schema"}},
        "response_format of no type": {"response_format": {"type": "poem"}},
        "response_format and constraint": {
            "response_format": {"type": "json_object"},
            "structured_outputs": {"regex": "1"},
        },
        "other model": {"model": "other"},
        "model with a colon": {"model": f"{MODEL}:adapter"},
        "model number": {"model": 3},
        "no messages": {"messages": NULL},
        "messages empty": {"messages": []},
        "messages text": {"messages": "hello"},
        "messages numbers": {"messages": [1, 2]},
        "message without a role": {"messages": [{"content": "x"}]},
        "message of no role": {"messages": [message("nobody", "x")]},
        "message without content": {"messages": [{"role": "user"}]},
        "content number": {"messages": [message("user", 5)]},
        "content of no type": {"messages": [message("user", [{"type": "smell", "smell": "x"}])]},
        "content part without type": {"messages": [message("user", [{"x": 1}])]},
        "continue and generate": {"continue_final_message": True, "add_generation_prompt": True},
        "chat template of the client": {"chat_template": "{{ messages }}"},
        "bad words number": {"bad_words": 3},
        "truncate -5": {"truncate_prompt_tokens": -5},
        "truncate too many": {"truncate_prompt_tokens": 10**7},
        "priority 5": {"priority": 5},
        "cache salt empty": {"cache_salt": ""},
        "reasoning effort": {"reasoning_effort": "extreme"},
        "beam search": {"use_beam_search": True, "n": 2, "stream": True},
        "echo and prompt_logprobs": {"echo": True, "prompt_logprobs": 1, "logprobs": True, "top_logprobs": 40},
        "kv transfer": {"kv_transfer_params": 3},
        "media io kwargs": {"media_io_kwargs": {"image": {"max_image_side": 10**9}}},
        "mm processor kwargs": {"mm_processor_kwargs": {"nonsense": 1}},
    }
    images = {
        "image that is none": [image("data:image/png;base64,AAAA")],
        "image cut off": [image(red[: len(red) // 2])],
        "image of bad base64": [image("data:image/png;base64,!!!")],
        "image of no scheme": [image("nothing")],
        "image file": [image("file:///etc/passwd")],
        "image of another domain": [image("http://127.0.0.1/x.png")],
        "image with a number": [{"type": "image_url", "image_url": 5}],
        "image without a url": [{"type": "image_url", "image_url": {}}],
        "image_url missing": [{"type": "image_url"}],
        "image uuid unknown": [{"type": "image_url", "image_url": None, "uuid": "never sent"}],
        "image uuid number": [image(red, uuid=5)],
        "image_pil": [{"type": "image_pil", "image_pil": "x.png"}],
        "image_embeds": [{"type": "image_embeds", "image_embeds": "AAAA"}],
        "audio part": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}],
        "video part": [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}],
    }
    long = "a" * 20_000
    return [
        *(chat(name, read, **options) for name, options in fields.items()),
        *(chat(name, *parts, read) for name, parts in images.items()),
        chat("prompt too long", long, status=400),
        *(completion(f"completion: {name}", **options) for name, options in bad_completions().items()),
        *(responses(f"responses: {name}", **options) for name, options in bad_responses().items()),
        *(post(f"tokenize: {name}", TOKENIZE, body) for name, body in bad_token_bodies("prompt").items()),
        *(post(f"detokenize: {name}", DETOKENIZE, body) for name, body in bad_token_bodies("tokens").items()),
        *bad_bodies(),
        *bad_paths(),
    ]


def bad_completions() -> dict[str, dict[str, Any]]:
    """Return what is wrong with a completion, by name."""
    return {
        "no prompt": {"prompt": NULL},
        "prompt missing": {"prompt": None},
        "prompt empty": {"prompt": ""},
        "prompts empty": {"prompt": []},
        "prompt of objects": {"prompt": [{}]},
        "prompt too long": {"prompt": "a" * 20_000},
        "token out of range": {"prompt": [10**7]},
        "token negative": {"prompt": [-1]},
        "logprobs 100": {"logprobs": 100},
        "logprobs -1": {"logprobs": -1},
        "best_of below n": {"n": 3, "best_of": 1},
        "stream_options without stream": {"stream_options": {"include_usage": True}},
        "echo and stream": {"echo": True, "stream": True, "logprobs": 1, "prompt_logprobs": 1},
        "prompt_embeds": {"prompt": None, "prompt_embeds": "AAAA"},
        "other model": {"model": "other"},
    }


def bad_responses() -> dict[str, dict[str, Any]]:
    """Return what is wrong with a request of the Responses API, by name."""
    return {
        "no input": {"input": None},
        "input number": {"input": 5},
        "item of no kind": {"input": [{"type": "thing"}]},
        "previous response": {"previous_response_id": "resp_none"},
        "background": {"background": True},
        "other model": {"model": "other"},
        "temperature -1": {"temperature": -1},
        "max_output_tokens -1": {"max_output_tokens": -1},
    }


def bad_token_bodies(name: str) -> dict[str, Any]:
    """Return bodies of /tokenize or /detokenize, whose field is `name`."""
    return {
        "nothing": {},
        "null": {name: None},
        "object": {name: {}},
        "text in a list": {name: ["a"]},
        "out of range": {name: [10**12]},
        "negative": {name: [-5]},
        "other model": {"model": "other", name: "x" if name == "prompt" else [5]},
        "a list": [1],
    }


def bad_bodies() -> list[Case]:
    """Return bodies that are not what they should be, whatever they say."""
    good = json.dumps({"model": MODEL, "messages": [message("user", "x")], "max_tokens": 1}).encode()
    return [
        Case("no body", status=400),
        Case("not JSON", body=b"{bad", status=400),
        Case("JSON cut off", body=good[:-5], status=400),
        Case("JSON and more", body=good + b"}", status=400),
        Case("a list", body=b"[]", status=400),
        Case("a number", body=b"5", status=400),
        Case("null", body=b"null", status=400),
        Case("not UTF-8", body=b'{"model": "\xff"}', status=400),
        Case("NaN", body=good[:-1] + b', "temperature": NaN}', status=400),
        Case("nested", body=b"[" * 5000 + b"]" * 5000, status=400),
        Case("text/plain", body=good, headers={"content-type": "text/plain"}),
        Case("no content type", body=good, headers={}),
        Case("form", body=b"a=b", headers={"content-type": "application/x-www-form-urlencoded"}),
        Case("charset", body=good, headers={"content-type": "application/json; charset=utf-8"}, status=200),
        Case("gzip that is none", body=good, headers={**JSON, "content-encoding": "gzip"}),
        Case("too large", body=b" " * 100_000_001, status=413),
    ]


def bad_paths() -> list[Case]:
    """Return paths and methods that are not there."""
    return [
        Case("nowhere", "GET", "/nowhere", status=404),
        Case("nowhere in v1", "POST", "/v1/nowhere", b"{}", status=404),
        Case("head of nowhere", "HEAD", "/nowhere", status=404),
        Case("get chat", "GET", CHAT, status=405),
        Case("delete chat", "DELETE", CHAT, status=405),
        Case("put completions", "PUT", COMPLETIONS, b"{}", status=405),
        Case("post models", "POST", "/v1/models", b"{}", status=405),
        Case("head of models", "HEAD", "/v1/models"),
        Case("head of chat", "HEAD", CHAT),
        Case("options of chat", "OPTIONS", CHAT),
        Case(
            "preflight of a page",
            "OPTIONS",
            CHAT,
            headers={"origin": "http://other.example", "access-control-request-method": "POST"},
        ),
        Case("of a page of another origin", "GET", "/v1/models", headers={"origin": "http://other.example"}),
        Case("head of health", "HEAD", "/health"),
        Case("post health", "POST", "/health"),
        Case("head of version", "HEAD", "/version"),
        Case("chat with a slash", "POST", f"{CHAT}/", b"{}"),
        Case("chat with a query", "POST", f"{CHAT}?a=b", b"{}"),
        Case("doubled slash", "GET", "//v1/models"),
        Case("escaped path", "GET", "/v1%2Fmodels"),
        Case("other model's card", "GET", "/v1/models/other"),
        Case("live without a WebSocket", "GET", "/v1/live"),
        Case("response of nobody", "GET", f"{RESPONSES}/resp_none"),
        Case("cancel a response of nobody", "POST", f"{RESPONSES}/resp_none/cancel"),
        Case("embeddings", "POST", "/v1/embeddings", b'{"input": "x"}'),
        Case("audio", "POST", "/v1/audio/transcriptions", b"{}"),
        Case("closed: render", "POST", "/v1/chat/completions/render", b"{}", status=404),
        Case("closed: inference", "POST", "/inference/v1/generate", b"{}", status=404),
        Case("closed: scaling", "POST", "/scale_elastic_ep", b"{}", status=404),
        Case("dev: reset cache", "POST", "/reset_prefix_cache"),
        Case("dev: sleep", "POST", "/sleep"),
    ]


def all_cases() -> list[Case]:
    """Return every request of the table."""
    cases = [*good_cases(), *bad_cases()]
    assert len({case.name for case in cases}) == len(cases)
    return cases


def comparable(answer: httpx.Response) -> dict[str, Any]:
    """Return what two servers must agree in."""
    origin = str(answer.url.copy_with(raw_path=b""))
    headers = {
        name: value.replace(origin, "")
        for name, value in answer.headers.items()
        if name not in HOP_HEADERS and not name.startswith("x-casa-")
    }
    kind = answer.headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        body: Any = merged([event(line) for line in answer.text.splitlines() if line])
    elif answer.url.path == "/openapi.json" and answer.content:
        # Lists in its schemas come in any order.
        body = sorted(answer.json()["paths"])
    elif kind.startswith("application/json") and answer.content:
        body = stable(answer.json())
    else:
        body = answer.content
    return {"status": answer.status_code, "headers": headers, "body": body}


def event(line: str) -> Any:
    """Return one line of a stream of events."""
    text = line.removeprefix("data: ")
    return stable(json.loads(text)) if text.startswith("{") else text


def merged(events: list[Any]) -> list[Any]:
    """Return the events of a stream with the tokens of each choice in one: how many come at once is chance.

    Args:
        events: Chunks, or events of another kind, which stay as they are.
    """
    choices: dict[int, dict[str, Any]] = {}
    others: list[Any] = []
    text = ""
    for chunk in events:
        if chunk == f"event: {TEXT_DELTA}":
            continue
        if isinstance(chunk, dict) and chunk.get("type") == TEXT_DELTA:
            text += chunk["delta"]
            continue
        if isinstance(chunk, dict):
            chunk.pop("sequence_number", None)
        parts = chunk.get("choices") if isinstance(chunk, dict) else None
        for part in parts or ():
            whole = choices.setdefault(part["index"], {"text": "", "tokens": [], "finish_reason": None, "first": part})
            whole["text"] += part.get("text") or part.get("delta", {}).get("content") or ""
            whole["tokens"] += (part.get("logprobs") or {}).get("content") or ()
            whole["finish_reason"] = part["finish_reason"] or whole["finish_reason"]
        # Usage that grows with the tokens: the last one counts.
        if not parts:
            others.append(chunk)
    for whole in choices.values():
        whole["role"] = whole.pop("first").get("delta", {}).get("role")
    return [dict(sorted(choices.items())), text, *others]


def stable(value: Any) -> Any:
    """Return JSON without what changes from answer to answer."""
    if isinstance(value, dict):
        return {name: stable(inner) for name, inner in value.items() if name not in VOLATILE}
    if isinstance(value, list):
        return [stable(inner) for inner in value]
    return value
