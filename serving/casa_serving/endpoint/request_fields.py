"""Limits on the fields of a parsed body, checked before models are built from it and texts are tokenised.

The rules do not depend on the path: a field means the same on every path, and a path that a later
version of vLLM adds is limited like the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from casa_engine.live.caption_logits import EXTRA_ARG
from casa_serving.endpoint.json_bounds import check_scalar, over_limit
from casa_serving.endpoint.schema_bounds import check_schemas
from casa_serving.errors import RequestError
from casa_serving.options.request_limits import RequestLimits

# Where images may be, under these names, as data URLs or base64: their bytes are bounded by the image guard.
CONVERSATIONS = ("messages", "input")
IMAGE_FIELDS = ("url", "image_url", "data")
# The name that a client gives an image: never tokenised, so that the model's context does not bound it.
IMAGE_NAME = "uuid"
MAX_TOKEN_ID = 2**31 - 1
# Limits: texts that are searched for after every token of an answer, and tokens whose probability is changed.
SAMPLING_LISTS = {"stop": 64, "stop_sequences": 64, "bad_words": 256, "stop_token_ids": 1024, "logit_bias": 1024}


class FieldChecker:
    """Checks parsed bodies.

    Args:
        limits: The server's limits.
        max_prompt_chars: Characters of the longest text that can fit into the model's context, if known.
    """

    def __init__(self, limits: RequestLimits, max_prompt_chars: int | None = None) -> None:
        self._limits, self._max_prompt_chars = limits, max_prompt_chars

    def check(self, body: dict[str, Any]) -> int:
        """Check a body; return the characters of its texts.

        Raises:
            RequestError: 400: a field is over a limit, or cannot be represented.
        """
        text_chars = 0
        for name, value in body.items():
            num_chars = self._check_text(name, "body")
            num_chars += sum(self._check_text(*found) for found in self._walk(name[:40], value, name))
            text_chars += num_chars
        if text_chars > self._limits.max_text_chars:
            raise over_limit(f"has {text_chars} characters of text", self._limits.max_text_chars, "max_text_chars")
        self._check_answers(body)
        check_extra_args(body)
        check_schemas(body, self._limits)
        for name, most in SAMPLING_LISTS.items():
            value = body.get(name)
            if isinstance(value, list | dict) and len(value) > most:
                raise RequestError(
                    400, f"{name!r} has too many entries: got {len(value)}, at most {most} are taken.", param=name
                )
        return text_chars

    def _walk(self, path: str, value: Any, root: str) -> Iterator[tuple[str, str, bool]]:
        """Yield every text in `value`, names of fields too; check everything else.

        Yields:
            The text, its path, and whether it may become part of the prompt.
        """
        pending = [(path, value)]
        while pending:
            path, value = pending.pop()
            if isinstance(value, dict):
                for name, item in value.items():
                    yield name, path, True
                    way = f"{path}.{name[:40]}" if len(path) < 100 else path
                    if root in CONVERSATIONS and is_image_name(name, item, value):
                        yield item, way, False
                    elif not (root in CONVERSATIONS and is_image(name, item, value)):
                        pending.append((way, item))
            elif isinstance(value, list):
                if not are_token_ids(value):
                    if len(value) > self._limits.max_list_items:
                        raise over_limit(
                            f"has {len(value)} items in {path!r}", self._limits.max_list_items, "max_list_items", path
                        )
                    pending += (
                        (f"{path}.{index}" if len(path) < 100 else path, item) for index, item in enumerate(value)
                    )
            elif isinstance(value, str):
                yield value, path, True
            else:
                check_scalar(value, path)

    def _check_text(self, text: str, path: str, is_prompt: bool = True) -> int:
        """Check a text; return its length."""
        check_scalar(text, path)
        if is_prompt and self._max_prompt_chars is not None and len(text) > self._max_prompt_chars:
            raise RequestError(
                400,
                f"The text of {path!r} cannot fit into the model's context: got {len(text)} characters, and "
                f"--max-model-len tokens hold at most {self._max_prompt_chars}. Send less text.",
                param=path,
            )
        return len(text)

    def _check_answers(self, body: dict[str, Any]) -> None:
        """Check the number of sequences that a request starts in the engine."""
        most = self._limits.max_n
        num_prompts = max(count_prompts(body), 1)
        for name in ("n", "best_of"):
            value = body.get(name)
            if isinstance(value, int) and value > most:
                raise RequestError(
                    400, f"{name!r} is too large: got {value}, at most {most} are taken (--max-n).", param=name
                )
            if isinstance(value, int) and value * num_prompts > most:
                raise RequestError(
                    400,
                    f"The request asks for too many answers: got {num_prompts} prompts with {name}={value}, at most "
                    f"{most} answers are given (--max-n). Send several requests.",
                    param=name,
                )
        if num_prompts > most:
            raise RequestError(
                400,
                f"The request has too many prompts: got {num_prompts}, at most {most} are taken (--max-n). "
                "Send several requests.",
            )


def check_extra_args(body: dict[str, Any]) -> None:
    """Reject the state of a live session, which only the server's own sessions may pass to the engine.

    Model Runner V2 validates no extra arguments, so that this is the one check for both runners. No valid request is
    rejected: the API's type for these arguments has no value that would be a state.

    Raises:
        RequestError: 400.
    """
    extra_args = body.get("vllm_xargs")
    if isinstance(extra_args, dict) and EXTRA_ARG in extra_args:
        name = f"vllm_xargs.{EXTRA_ARG}"
        raise RequestError(
            400,
            f"{name!r} is the state of a live session, and no request can bring one: leave it out, and use /v1/live "
            "for live sessions.",
            param=name,
        )


def is_image_name(name: str, item: Any, parent: dict[str, Any]) -> bool:
    """Return whether a field in a conversation is the name of an image."""
    kind = parent.get("type")
    return name == IMAGE_NAME and isinstance(item, str) and isinstance(kind, str) and "image" in kind


def is_image(name: str, item: Any, parent: dict[str, Any]) -> bool:
    """Return whether a field in a conversation is an image, whose size the image guard bounds.

    Anthropic's API has bare base64 in `data`, beside `media_type`.
    """
    if not isinstance(item, str) or name not in IMAGE_FIELDS:
        return False
    return "media_type" in parent if name == "data" else item[:5].lower() == "data:"


def are_token_ids(value: list[Any]) -> bool:
    """Return whether a list contains token ids only; they are cheap, and may be many."""
    return bool(value) and all(type(item) is int and 0 <= item <= MAX_TOKEN_ID for item in value)


def count_prompts(body: dict[str, Any]) -> int:
    """Return how many prompts a request has: texts, lists of token ids, or conversations."""
    for name in ("prompt", "messages", "items"):
        value = body.get(name)
        if isinstance(value, list) and (name == "items" or any(isinstance(item, str | list) for item in value)):
            return len(value)
    return 0
