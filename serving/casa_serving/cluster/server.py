"""A replica: Ray Serve LLM's server around one vLLM engine with the CASA plugin."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any

from PIL import Image
from ray import serve
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest, ErrorResponse
from vllm.exceptions import GracefulHTTPError

from casa_serving.cluster.answers import error_body
from casa_serving.cluster.replica_metrics import ReplicaMetrics

LOGGER = logging.getLogger("ray.serve")
# A replica that has answered anything within this time needs no probe.
FRESH_S = 5.0
WARM_UP_SIDE = 56


class UnhealthyError(RuntimeError):
    """A probe through the request path failed; Ray Serve replaces the replica."""


class CasaServer(LLMServer):
    """Serves one engine; ready when a request with an image has been answered."""

    async def start(self) -> None:
        """Starts the engine and answers one request of each kind, so that no client pays for first times."""
        self._last_answer = 0.0
        self._metrics = ReplicaMetrics(serve.get_replica_context().replica_id.unique_id)
        await super().start()
        for name, request in warm_up_requests(self._llm_config.model_id).items():
            started = time.monotonic()
            await self._consume(request)
            LOGGER.info("Warm-up: %s took %.2f s", name, time.monotonic() - started)

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        """See `LLMServer.chat`."""
        return self._watched(await super().chat(request, raw_request_info))

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        """See `LLMServer.completions`."""
        return self._watched(await super().completions(request, raw_request_info))

    async def check_health(self) -> None:
        """Asks the engine, then has it answer one token unless it has just answered a client.

        Raises:
            UnhealthyError: The request path does not answer with a completion.
        """
        await super().check_health()
        if time.monotonic() - self._last_answer > FRESH_S:
            await self._consume(chat_request(self._llm_config.model_id, "ok"))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve every few seconds for the autoscaling policy; exports metrics at the same pace."""
        self._metrics.export()
        return {"casa_live_sessions": float(self.num_live_sessions())}

    def num_live_sessions(self) -> int:
        """Live sessions on this replica: none until /v1/live is served here."""
        return 0

    async def _watched(self, answers: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Passes answers on and notes when; turns vLLM's own refusals with a status into answers."""
        try:
            async for answer in answers:
                self._last_answer = time.monotonic()
                yield answer
        except GracefulHTTPError as error:
            yield ErrorResponse(**error_body(error.message, "OverloadedError", int(error.http_status)))

    async def _consume(self, request: ChatCompletionRequest) -> None:
        async for answer in await self.chat(request):
            if isinstance(answer, ErrorResponse):
                raise UnhealthyError(f"The engine refused a probe: {answer.error.message}")


def chat_request(model: str, text: str, *images: str, **options: Any) -> ChatCompletionRequest:
    """Returns a request for one token.

    Args:
        model: The model's name.
        text: What is said.
        *images: Data URLs.
        **options: Other fields of the request.
    """
    content = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    return ChatCompletionRequest(model=model, messages=[message], max_tokens=1, temperature=0, **options)


def warm_up_requests(model: str) -> dict[str, ChatCompletionRequest]:
    """Returns a text, an image and a stream by name: what goes through different code the first time."""
    picture = BytesIO()
    Image.new("RGB", (WARM_UP_SIDE, WARM_UP_SIDE), "gray").save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    return {
        "text": chat_request(model, "ok"),
        "image": chat_request(model, "ok", url),
        "stream": chat_request(model, "ok", url, stream=True),
    }
