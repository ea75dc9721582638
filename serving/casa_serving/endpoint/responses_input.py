"""The items of `/v1/responses`: a default that OpenAI has and vLLM's model has not, and a check that stops early.

vLLM 0.29.0 takes an item for one of some 230 alternatives, and reports for each why it did not
fit: 200 bad items of 60 bytes are 46,000 errors. Here they are tried one by one; the first bad
one is the answer.
"""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import ValidationError

from casa_serving.errors import RequestError, describe_validation

PATH = "/v1/responses"
# vLLM takes 0.6 s to read 2,000 items, in which nobody else is answered.
MAX_ITEMS = 512
# An item takes vLLM a millisecond; so many, and the event loop has its turn.
ITEMS_AT_ONCE = 16


def set_image_detail(body: dict[str, Any]) -> bool:
    """Sets `detail` of every `input_image` that has none to "auto", as OpenAI does.

    Mutates:
        body: its images.

    Returns:
        Whether there was one.
    """
    items = body.get("input")
    contents = [item.get("content") for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    images = [
        part
        for content in contents
        if isinstance(content, list)
        for part in content
        if isinstance(part, dict) and part.get("type") == "input_image" and part.get("detail") is None
    ]
    for image in images:
        image["detail"] = "auto"
    return bool(images)


async def check_items(body: dict[str, Any]) -> None:
    """Checks each item of `input` by vLLM's own model.

    Raises:
        RequestError: 400: an item is not what the API takes.
    """
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    items = body.get("input")
    if not isinstance(items, list):
        return
    if len(items) > MAX_ITEMS:
        message = f"'input' has too many items: got {len(items)}, at most {MAX_ITEMS} are taken."
        raise RequestError(400, message, param="input")
    for number, item in enumerate(items):
        if number % ITEMS_AT_ONCE == ITEMS_AT_ONCE - 1:
            await asyncio.sleep(0)
        try:
            ResponsesRequest.model_validate({"input": [item]})
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False)
            for problem in problems:
                problem["loc"] = tuple(number if step == 0 else step for step in problem["loc"])
            message, param = describe_validation(problems)
            raise RequestError(400, message, param=param) from error
