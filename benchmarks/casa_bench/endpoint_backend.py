"""`--backend endpoint`: anybody's OpenAI-compatible server, by streamed chat completions.

A server keeps no conversation: each turn sends all of it again, frames included, and what that costs depends on the
server's caches. Its time to first token holds upload, tokenisation and preprocessing of all of that. Its memory, its KV
cache and its processor time cannot be seen from outside.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from casa_bench.backend import Answer, Message, Needs, Turn
from casa_bench.frames import jpeg, noise_frame
from casa_engine.errors import InputError
from casa_engine.live import LiveSettings
from casa_engine.server_address import is_server_address

TIMEOUT_S = 600.0
# Of one request, base64 included; what is larger many servers refuse (casa serve takes 100 MB).
MAX_BODY_BYTES = 60 * 2**20


class EndpointBackend:
    """See `Backend`.

    Args:
        url: The server's address, with or without `/v1`.
        needs: What will be asked at most.
        model: The model's name there; None takes the first that it serves.
        api_key: Its key, if it has one.
        ignore_eos: Whether to ask for answers that do not end early, which is an extension of vLLM and SGLang.

    Raises:
        InputError: The address is none, nobody answers there, or a request would be too large.
    """

    name = "endpoint"

    def __init__(self, url: str, needs: Needs, model: str | None, api_key: str | None, *, ignore_eos: bool) -> None:
        from openai import AsyncOpenAI

        self.base_url = base_url(url)
        refuse_large_bodies(needs)
        self._extra = {"ignore_eos": True} if ignore_eos else {}
        self._runner = asyncio.Runner()
        self._client = AsyncOpenAI(base_url=self.base_url, api_key=api_key or "none", timeout=TIMEOUT_S, max_retries=0)
        try:
            self.model = model or self._run(first_model(self._client, self.base_url))
        except InputError:
            self.close()
            raise
        self.about = {"model": self.model, "fusion": "", "device": "", "url": self.base_url}

    def open_stream(self) -> EndpointStream:
        """See `Backend`."""
        return EndpointStream(self)

    def answer(self, chats: Sequence[Sequence[Message]], num_tokens: int) -> list[Answer]:
        """See `Backend`; each conversation is a request of its own, all open at once."""
        return [answer for answer, _ in self._run(self._all(chats, num_tokens))]

    def answer_one(self, messages: Sequence[Message], num_tokens: int) -> tuple[Answer, int | None]:
        """Answer one conversation; return the server's count of its prompt's tokens too."""
        return self._run(self._ask(messages, num_tokens, time.perf_counter()))

    def close(self) -> None:
        """See `Backend`."""
        self._run(self._client.close())
        self._runner.close()

    async def _all(self, chats: Sequence[Sequence[Message]], num_tokens: int) -> list[tuple[Answer, int | None]]:
        begun_s = time.perf_counter()
        return await asyncio.gather(*(self._ask(messages, num_tokens, begun_s) for messages in chats))

    async def _ask(self, messages: Sequence[Message], num_tokens: int, begun_s: float) -> tuple[Answer, int | None]:
        """Ask and read the stream; the first token is the first event with text, or the first of all without any."""
        first_s = first_event_s = last_s = 0.0
        text, usage = [], None
        events = await self._client.chat.completions.create(
            model=self.model,
            messages=[as_openai(message) for message in messages],
            max_tokens=num_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=self._extra,
        )
        async for event in events:
            usage = event.usage or usage
            if not event.choices:
                continue
            last_s = time.perf_counter()
            first_event_s = first_event_s or last_s
            if piece := event.choices[0].delta.content:
                first_s = first_s or last_s
                text.append(piece)
        if not last_s:
            raise InputError(f"{self.base_url} ended an answer without a token; expected a stream of chat completions.")
        ttft_ms = 1000 * ((first_s or first_event_s) - begun_s)
        tokens = usage.completion_tokens if usage else len(text)
        answer = Answer("".join(text), ttft_ms, 1000 * (last_s - begun_s), tokens)
        return answer, usage.prompt_tokens if usage else None

    def _run(self, work: Any) -> Any:
        """Run a coroutine; what goes wrong with the server is one sentence."""
        import openai

        try:
            return self._runner.run(work)
        except openai.APIStatusError as error:
            advice = " Leave `ignore_eos` out with --may-stop." if self._extra and error.status_code == 400 else ""
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{self.base_url} refuses a request: {reason}.{advice}") from error
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            raise no_openai_server(self.base_url, error) from error


class EndpointStream:
    """See `Stream`: a chat in which every user message is a frame; the whole of it is sent each turn."""

    def __init__(self, backend: EndpointBackend) -> None:
        self._backend = backend
        self._messages: list[Message] = []

    def turn(self, frame: Image.Image, num_tokens: int) -> Turn:
        """See `Stream`."""
        begun_s = time.perf_counter()
        content = [image_item(frame)]
        if not self._messages:
            content.append({"type": "text", "text": LiveSettings.instruction})
        self._messages.append({"role": "user", "content": content})
        prepare_ms = 1000 * (time.perf_counter() - begun_s)
        answer, prompt_tokens = self._backend.answer_one(self._messages, num_tokens)
        self._messages.append({"role": "assistant", "content": [{"type": "text", "text": answer.text}]})
        return Turn(
            ttft_ms=answer.ttft_ms,
            decode_ms=answer.total_ms - answer.ttft_ms,
            tokens=answer.tokens,
            prepare_ms=prepare_ms,
            # The last token was only sampled.
            kv_tokens=None if prompt_tokens is None else prompt_tokens + answer.tokens - 1,
        )

    def close(self) -> None:
        """See `Stream`; the server holds nothing."""
        self._messages.clear()


def base_url(url: str) -> str:
    """Return the address that OpenAI's client takes.

    Raises:
        InputError: It is none.
    """
    if not is_server_address(url):
        raise InputError(f"{url!r} is not the address of a server; expected one such as http://127.0.0.1:8000/v1.")
    return url if urlsplit(url).path.strip("/") else url.rstrip("/") + "/v1"


async def first_model(client: Any, address: str) -> str:
    """Return the first model that a server serves.

    Args:
        client: OpenAI's asynchronous client.
        address: The server's address, for messages.

    Raises:
        InputError: It lists none.
        openai.OpenAIError, ValueError: It does not answer as such a server does.
    """
    import httpx

    listed = json.loads((await client.get("/models", cast_to=httpx.Response)).text)
    served = listed.get("data") if isinstance(listed, dict) else None
    first = served[0] if isinstance(served, list) and served else None
    if not isinstance(first, dict) or not isinstance(first.get("id"), str):
        raise InputError(f"{address} lists no model; expected one: name it with --served-model.")
    return first["id"]


def no_openai_server(address: str, error: Exception) -> InputError:
    """Return the error of a server that cannot be reached or speaks otherwise."""
    reason = " ".join(str(error.__cause__ or error).split())[:300]
    return InputError(
        f"{address} does not answer as an OpenAI-compatible server does: {reason}. Pass the address of one, such as "
        "http://127.0.0.1:8000/v1."
    )


def refuse_large_bodies(needs: Needs) -> None:
    """Raise InputError where a conversation's last request would be larger than servers take."""
    total = needs.images * len(data_url(noise_frame(0, 0, needs.image_px)))
    if total > MAX_BODY_BYTES:
        raise InputError(
            f"a conversation of {needs.images} images of {needs.image_px} px is a request of {total / 2**20:.0f} MiB, "
            f"and each turn sends all of it again; expected up to {MAX_BODY_BYTES // 2**20}: show fewer or smaller "
            "images, or measure the checkpoint itself with --backend engine."
        )


def image_item(frame: Image.Image) -> dict[str, Any]:
    """Return a content item of an image that is encoded already, so that sending it again encodes nothing."""
    return {"type": "image", "image": frame, "url": data_url(frame)}


def data_url(frame: Image.Image) -> str:
    """Return a frame as a data URL."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(frame)).decode()


def as_openai(message: Message) -> dict[str, Any]:
    """Return a message in OpenAI's form; what a model said is plain text."""
    if message["role"] == "assistant":
        return {"role": "assistant", "content": "".join(item["text"] for item in message["content"])}
    return {"role": message["role"], "content": [_as_openai_item(item) for item in message["content"]]}


def _as_openai_item(item: dict[str, Any]) -> dict[str, Any]:
    if item["type"] == "text":
        return item
    return {"type": "image_url", "image_url": {"url": item.get("url") or data_url(item["image"])}}
