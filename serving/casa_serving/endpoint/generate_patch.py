"""Wraps `generate` of vLLM's engine client, for vLLM 0.29.0: a grammar that fails in the engine becomes a client error.

The engine compiles a request's grammar and checks each token against it. A regular expression that takes too long to
compile, a grammar that no text satisfies, or one that leaves only forbidden tokens is detected only there.
All that comes back is the finish reason "error", for which vLLM returns 500 on every path. There is no hook between
the two.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm import SamplingParams
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput

from casa_serving.errors import RequestError

PARAMETERS = ["prompt", "sampling_params", "request_id"]
UNANSWERABLE = (
    "No answer can be given that fits the grammar of the request (structured_outputs, response_format, text.format or "
    "tools): it could not be compiled in time, no text satisfies it, or what it demands is forbidden by other "
    "settings, such as bad_words or allowed_token_ids. Send a simpler one, or fewer settings beside it."
)


class FailedGrammarError(RequestError, VLLMValidationError):
    """A grammar that the engine could not satisfy; a validation error to vLLM too, which so ends streams."""

    def __init__(self) -> None:
        super().__init__(400, UNANSWERABLE)


def reject_failed_grammars(engine_client: EngineClient) -> None:
    """Make `generate` raise a client error if a request with a grammar has failed. Idempotent.

    Mutates:
        engine_client: Its `generate`.

    Raises:
        RuntimeError: vLLM's function is not the one that this was written for.
    """
    generate = engine_client.generate
    if generate.__module__ == __name__:
        return
    if not inspect.isasyncgenfunction(generate) or list(inspect.signature(generate).parameters)[:3] != PARAMETERS:
        raise RuntimeError(
            "vLLM's EngineClient.generate has changed: see what casa_serving.endpoint.generate_patch does to it."
        )

    def generate_or_reject(
        prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        outputs = generate(prompt, sampling_params, request_id, **options)
        return outputs if sampling_params.structured_outputs is None else raise_on_failure(outputs)

    engine_client.generate = generate_or_reject


async def raise_on_failure(outputs: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[RequestOutput, None]:
    """Yield the outputs of a request with a grammar.

    Raises:
        FailedGrammarError: The grammar failed in the engine.
    """
    async with aclosing(outputs):
        async for output in outputs:
            if any(answer.finish_reason == "error" for answer in output.outputs):
                raise FailedGrammarError
            yield output
