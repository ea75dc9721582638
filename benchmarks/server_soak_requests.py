"""The requests of `server_soak.py`: a seeded mix of what clients of a server do, good and bad."""

import asyncio
import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from casa_digits.cases import COUNT, READ
from casa_digits.data import draw_image, load_samples
from request_fuzzer import Case, fault_of

MODEL = "casa-tiny-digits"
NUM_FILES = 300
MAX_IMAGES = 60
# Shares of the kinds of requests.
MIX = {"chat": 0.44, "stream": 0.16, "structured": 0.1, "abort": 0.1, "refused": 0.1, "malformed": 0.1}
# Fields by which a request is refused after its images were processed.
REFUSALS = (
    {"temperature": -1},
    {"top_p": 7},
    {"max_tokens": 10**6},
    {"logit_bias": {"999999": 1}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
    {"structured_outputs": {"regex": "["}},
    {"stop": [""] * 40},
    {"model": "no-such-model"},
)
STRUCTURES = (
    {"structured_outputs": {"regex": "[0-9]( [0-9])*"}},
    {"structured_outputs": {"choice": ["1", "2", "3", "4"]}},
    {"response_format": {"type": "json_object"}},
)


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        kind: The key of `MIX`.
        status: HTTP's; 0 for a request that the client broke off, -1 for a connection that the server broke.
        problem: Why the answer is not what a client may expect; None if it is.
        latency_s: Until the last byte.
    """

    kind: str
    status: int
    problem: str | None
    latency_s: float


def draw_files(seed: int) -> list[str]:
    """Return data URLs of images of digits; few enough that most requests show one again."""
    rng, samples = np.random.default_rng(seed), load_samples(held_out=True)
    urls = []
    for _ in range(NUM_FILES):
        file = io.BytesIO()
        draw_image(rng, samples).to_pil().save(file, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return urls


def num_images(rng: np.random.Generator) -> int:
    """Return 0 to 60, mostly few."""
    most = int(rng.choice([0, 1, 3, 10, MAX_IMAGES], p=[0.2, 0.4, 0.25, 0.1, 0.05]))
    return int(rng.integers(0, most + 1)) if most > 1 else most


def chat_body(rng: np.random.Generator, urls: list[str]) -> dict[str, Any]:
    """Return a chat whose turns show one image each."""
    messages: list[dict[str, Any]] = []
    for number in range(num_images(rng)):
        if number:
            messages.append({"role": "assistant", "content": "1 2"})
        url = urls[int(rng.integers(len(urls)))]
        part = {"type": "image_url", "image_url": {"url": url}}
        messages.append({"role": "user", "content": [part, {"type": "text", "text": READ}]})
    if not messages or rng.random() < 0.3:
        if messages:
            messages.append({"role": "assistant", "content": "1 2"})
        messages.append({"role": "user", "content": COUNT})
    body = {"model": MODEL, "messages": messages, "max_tokens": int(rng.integers(1, 17)), "temperature": 0}
    if rng.random() < 0.1:
        body |= {"logprobs": True, "top_logprobs": 5}
    if rng.random() < 0.05:
        body |= {"n": 3, "temperature": 0.7}
    return body


async def chat(client: httpx.AsyncClient, kind: str, body: dict[str, Any], wanted: Callable[[int], bool]) -> Outcome:
    """Send a chat and read the whole answer."""
    started = asyncio.get_running_loop().time()
    answer = await client.post("/v1/chat/completions", json=body)
    return judge(kind, answer.status_code, answer.text, wanted, asyncio.get_running_loop().time() - started)


def judge(kind: str, status: int, text: str, wanted: Callable[[int], bool], latency_s: float) -> Outcome:
    """Return what an answer amounts to: its status is as wanted and an error has OpenAI's shape."""
    problem = fault_of(status, text.encode())
    if not wanted(status):
        problem = f"status {status}: {text[:300]!r}"
    return Outcome(kind, status, problem, latency_s)


async def stream(client: httpx.AsyncClient, body: dict[str, Any], break_off_after: int | None) -> Outcome:
    """Send a chat whose answer is streamed; leave after so many lines if given."""
    started, kind = asyncio.get_running_loop().time(), "stream" if break_off_after is None else "abort"
    lines: list[str] = []
    async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
        async for line in answer.aiter_lines():
            lines.append(line)
            if break_off_after is not None and len(lines) >= break_off_after:
                return Outcome(kind, 0, None, asyncio.get_running_loop().time() - started)
        status = answer.status_code
    latency_s = asyncio.get_running_loop().time() - started
    text = "\n".join(lines)
    if status == 200 and "data: [DONE]" not in lines:
        return Outcome(kind, status, f"the stream ends without [DONE]: {text[-200:]!r}", latency_s)
    return judge(kind, status, text if status != 200 else "", lambda found: found == 200, latency_s)


async def broken_off(client: httpx.AsyncClient, body: dict[str, Any], after_s: float) -> Outcome:
    """Send a chat and leave before its answer, most of the time."""
    try:
        async with asyncio.timeout(after_s):
            return await chat(client, "abort", body, lambda status: status == 200)
    except TimeoutError:
        return Outcome("abort", 0, None, after_s)


async def damaged(client: httpx.AsyncClient, case: Case) -> Outcome:
    """Send a malformed request; what the fuzzer finds wrong with its answer is the problem."""
    started = asyncio.get_running_loop().time()
    answer = await client.request(case.method, case.path, headers=case.headers, content=case.body)
    problem = None if case.method == "HEAD" else fault_of(answer.status_code, answer.content)
    if problem:
        problem = f"{case.method} {case.path} {case.body[:300]!r}: {problem}"
    return Outcome("malformed", answer.status_code, problem, asyncio.get_running_loop().time() - started)


async def send(
    client: httpx.AsyncClient, number: int, seed: int, urls: list[str], malformed: Iterator[Case]
) -> Outcome:
    """Send request `number` of the soak.

    Args:
        client: With the server as its base address.
        number: Of the request; with `seed` it determines the request.
        seed: Of the soak.
        urls: Data URLs of the images.
        malformed: Invalid requests.
    """
    rng = np.random.default_rng([seed, number])
    kind = str(rng.choice(list(MIX), p=list(MIX.values())))
    if kind == "malformed":
        return await damaged(client, next(malformed))
    body = chat_body(rng, urls)
    if kind == "stream":
        return await stream(client, body, None)
    if kind == "abort" and rng.random() < 0.5:
        return await stream(client, body, int(rng.integers(1, 6)))
    if kind == "abort":
        return await broken_off(client, body, float(rng.uniform(0.001, 0.3)))
    if kind == "refused":
        body |= REFUSALS[int(rng.integers(len(REFUSALS)))]
        return await chat(client, kind, body, lambda status: 400 <= status < 500)
    if kind == "structured":
        body |= STRUCTURES[int(rng.integers(len(STRUCTURES)))]
    return await chat(client, kind, body, lambda status: status == 200)
