"""Wraps `message_stream_converter` of vLLM's `/v1/messages`, for vLLM 0.29.0: an error in a stream keeps its message.

The converter reads the stream of a chat. An event with an error is no piece of a chat to it, and becomes a list of the
fields that such a piece would have. There is no hook between the two.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from casa_serving.drain.final_messages import end_of_stream

ERROR = 'data: {"error":'
PATH = "/v1/messages"


def preserve_stream_errors(messages: Any) -> None:
    """Make the converter end with Anthropic's error event if the chat ends with an error. Idempotent.

    Args:
        messages: vLLM's `AnthropicServingMessages`.

    Mutates:
        messages: Its `message_stream_converter`.

    Raises:
        RuntimeError: vLLM's function is not the one that this was written for.
    """
    convert = messages.message_stream_converter
    if convert.__module__ == __name__:
        return
    if not inspect.isasyncgenfunction(convert) or list(inspect.signature(convert).parameters) != ["generator"]:
        raise RuntimeError(
            "vLLM's message_stream_converter has changed: see what casa_serving.endpoint.messages_patch does to it."
        )

    async def convert_with_errors(generator: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        errors: list[dict[str, Any]] = []
        async with aclosing(convert(until_error(generator, errors))) as events:
            async for event in events:
                yield event
        for error in errors:
            yield end_of_stream(PATH, error["message"], b"", error["code"])["body"].decode()

    messages.message_stream_converter = convert_with_errors


async def until_error(pieces: AsyncGenerator[str, None], errors: list[dict[str, Any]]) -> AsyncGenerator[str, None]:
    """Yield the pieces of a chat's stream before an error.

    Mutates:
        errors: The error's object is added.
    """
    async with aclosing(pieces):
        async for piece in pieces:
            if piece.startswith(ERROR):
                errors.append(json.loads(piece.removeprefix("data: "))["error"])
                return
            yield piece
