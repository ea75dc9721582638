"""One vLLM request whose prompt grows by chunks (streaming input), and which can be closed at any time."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any

from casa_engine.errors import CasaError

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.engine.protocol import EngineClient, StreamingInput
    from vllm.outputs import CompletionOutput, RequestOutput

# vLLM's finish reasons of a chunk that ended normally.
NORMAL_FINISH_REASONS = ("stop", "length")


class RequestLostError(CasaError, RuntimeError):
    """The engine has aborted the request: its text has to be prefilled again."""


class EngineRequest:
    """A growing request. A task of its own owns vLLM's generator, so that it can be closed while it is running.

    Args:
        engine: vLLM's client.
        params: Sampling parameters of the first chunk.
    """

    def __init__(self, engine: EngineClient, params: SamplingParams) -> None:
        self._engine, self._params = engine, params
        self._chunks: asyncio.Queue[StreamingInput] = asyncio.Queue()
        self._outputs: asyncio.Queue[RequestOutput | BaseException | None] = asyncio.Queue()
        self._is_closed = False
        self._task = asyncio.create_task(self._run())

    async def generate(self, prompt: Any, params: SamplingParams) -> AsyncIterator[CompletionOutput]:
        """Send a rendered chunk to the engine; yield its outputs until the chunk's answer is complete.

        Raises:
            RequestLostError: The engine ended the request.
        """
        from vllm.engine.protocol import StreamingInput

        self._chunks.put_nowait(StreamingInput(prompt, params))
        while True:
            output = await self._outputs.get()
            if isinstance(output, BaseException):
                raise output
            if output is None:
                raise RequestLostError("the engine ended a live session's request.")
            (completion,) = output.outputs
            if completion.finish_reason not in (None, *NORMAL_FINISH_REASONS):
                raise RequestLostError(f"the engine ended a live session's request: {completion.finish_reason}.")
            yield completion
            if completion.finish_reason is not None:
                return

    async def close(self) -> None:
        """Abort the request and free all its pages. Safe at any time; idempotent."""
        self._is_closed = True
        self._task.cancel()
        await asyncio.wait([self._task])
        self._outputs.put_nowait(None)

    async def _run(self) -> None:
        try:
            name = f"live-{uuid.uuid4().hex}"
            async for output in self._engine.generate(self._inputs(), self._params, name):
                self._outputs.put_nowait(output)
            self._outputs.put_nowait(None)
        except Exception as error:  # noqa: BLE001 (raised again in `generate`)
            self._outputs.put_nowait(error)

    async def _inputs(self) -> AsyncGenerator[StreamingInput, None]:
        while True:
            chunk = await self._chunks.get()
            if self._is_closed:
                # The engine would get the chunk after the abort of its request.
                await asyncio.Event().wait()
            yield chunk
