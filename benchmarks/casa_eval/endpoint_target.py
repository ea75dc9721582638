"""`--url`: anybody's OpenAI-compatible server, by chat completions; images travel as PNG."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable, Iterator
from io import BytesIO
from typing import Any

from PIL import Image

from casa_bench.backend import Message
from casa_bench.endpoint_backend import as_openai, base_url, first_model, no_openai_server
from casa_engine.errors import InputError
from casa_eval.target import Reply, Request, checked_answer

TIMEOUT_S = 600.0
# Beside the first: of a request that the server has no room for, or whose connection broke.
RETRIES = 2
# What every other request would be answered too: no such model, no right to ask.
FATAL_STATUS = (401, 403, 404)


class EndpointTarget:
    """See `Target`.

    Args:
        url: The server's address, with or without `/v1`.
        model: The model's name there; None takes the first that it serves.
        api_key: Its key, if it has one.
        concurrency: Requests at once.

    Raises:
        InputError: The address is none, or nobody answers there as an OpenAI-compatible server does.
    """

    name = "endpoint"

    def __init__(self, url: str, model: str | None, api_key: str | None, *, concurrency: int) -> None:
        import openai

        self.base_url = base_url(url)
        self._concurrency = concurrency
        self._runner = asyncio.Runner()
        self._client = openai.AsyncOpenAI(
            base_url=self.base_url, api_key=api_key or "none", timeout=TIMEOUT_S, max_retries=RETRIES
        )
        try:
            self.model = model or self._runner.run(first_model(self._client, self.base_url))
        except openai.APIStatusError as error:
            self.close()
            raise refusal(self.base_url, error) from error
        except InputError:
            self.close()
            raise
        except (openai.OpenAIError, ValueError) as error:
            self.close()
            raise no_openai_server(self.base_url, error) from error
        self.about = {"url": self.base_url}

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Reply]]:
        """See `Target`."""
        loop, waiting, is_over = self._runner.get_loop(), iter(requests), False
        running: dict[asyncio.Task[Reply], Request] = {}
        try:
            while True:
                while not is_over and len(running) < self._concurrency:
                    request = next(waiting, None)
                    is_over = request is None
                    if request is not None:
                        running[loop.create_task(self._ask(request))] = request
                if not running:
                    return
                done, _ = self._runner.run(_first_of(running))
                # Answers first, which would be lost. `exception` marks an error as seen: asyncio would print it.
                for task in sorted(done, key=lambda each: each.exception() is not None):
                    yield running.pop(task), task.result()
        finally:
            for task in running:
                task.cancel()

    def close(self) -> None:
        """See `Target`."""
        self._runner.run(self._client.close())
        self._runner.close()

    async def _ask(self, request: Request) -> Reply:
        """Return the answer, or what the server said of this one request.

        Raises:
            InputError: The server is gone, or refuses all requests.
        """
        import openai

        try:
            completion = await self._client.chat.completions.create(
                model=self.model,
                messages=[as_openai(with_png(message)) for message in request.messages],
                max_tokens=request.max_new_tokens,
                temperature=0,
            )
        except openai.APITimeoutError:
            return InputError(f"{self.base_url} gave no answer within {TIMEOUT_S:.0f} s.")
        except openai.APIStatusError as error:
            if error.status_code in FATAL_STATUS:
                raise refusal(self.base_url, error) from error
            return refusal(self.base_url, error)
        except (openai.OpenAIError, ValueError) as error:
            raise no_openai_server(self.base_url, error) from error
        try:
            return checked_answer(completion.choices[0].message.content)
        except (AttributeError, IndexError, TypeError):
            return InputError(f"{self.base_url} answered without a message; expected a chat completion.")


async def _first_of(tasks: Iterable[asyncio.Task[Reply]]) -> Any:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def refusal(address: str, error: Exception) -> InputError:
    """Return what a server said of a request that it did not answer."""
    return InputError(f"{address} refuses a request: {' '.join(str(error).split())[:300]}.")


def with_png(message: Message) -> Message:
    """Return a message whose images are encoded without loss: a JPEG's blocks would blur small print."""
    content = [
        item | {"url": png_url(item["image"])} if item["type"] == "image" else item for item in message["content"]
    ]
    return message | {"content": content}


def png_url(image: Image.Image) -> str:
    """Return an image as a data URL."""
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
