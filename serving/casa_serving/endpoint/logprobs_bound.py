"""Limit on the log probabilities in one response.

vLLM builds an object for each and serialises all of them at once, which blocks the event loop:
4,000 tokens with 20 alternatives each blocked `/health` for 5 s. Streams have an event for each token
and need no bound.
"""

from __future__ import annotations

from typing import Any

from casa_serving.endpoint.json_bounds import over_limit
from casa_serving.options.request_limits import RequestLimits

# Upper limit of what the chat template adds to a message, in tokens.
TOKENS_OF_A_MESSAGE = 64
# The shortest length that is set by default; if less is possible the client must set it.
SHORTEST = 256
MAX_TOKENS_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


def bound_logprobs(
    body: dict[str, Any], text_chars: int, limits: RequestLimits, max_model_len: int | None = None
) -> bool:
    """Limit the log probabilities that a request asks for.

    A conversation without a maximum length gets the largest that fits; a text has at most as many
    tokens as characters.

    Args:
        body: The request.
        text_chars: Characters of its texts.
        limits: The server's limits.
        max_model_len: The model's context in tokens, if known, which also bounds the answer.

    Mutates:
        body: The maximum length, if it is not set.

    Returns:
        Whether `body` was changed.

    Raises:
        RequestError: 400: it asks for more than the limit.
    """
    most = limits.max_logprobs_values
    asked = [body.get(name) for name in ("logprobs", "top_logprobs", "prompt_logprobs")]
    logprobs, top, prompt = (value if isinstance(value, int) else 0 for value in asked)
    if logprobs is True:  # In a conversation; `top_logprobs` is the number.
        logprobs, top = 0, max(top, 1)
    prompt_tokens = text_chars + count_token_ids(body.get("prompt"))
    if (prompt or (logprobs and body.get("echo"))) and prompt_tokens * (max(prompt, logprobs, 0) + 1) > most:
        raise over_limit("asks for too many log probabilities of its prompt", most, "max_logprobs_values")
    if body.get("stream") or not (logprobs or top):
        return False
    answers = body.get("n") if isinstance(body.get("n"), int) and body["n"] > 0 else 1
    each = answers * (max(logprobs, top, 0) + 1)
    lengths = {name: body[name] for name in MAX_TOKENS_FIELDS if isinstance(body.get(name), int)}
    for name, length in lengths.items():
        if length * each > most:
            raise over_limit(
                f"asks for too many log probabilities with {name}={length}", most, "max_logprobs_values", name
            )
    if lengths or "prompt" in body:  # A completion has 16 tokens by default.
        return False
    field = "max_output_tokens" if "input" in body else "max_tokens"
    longest = max(most // each, 1)
    if max_model_len is not None:
        if longest >= max_model_len:
            return False
        # The rest of the context is known only when the prompt is tokenised.
        left = max_model_len - text_chars - TOKENS_OF_A_MESSAGE * len(body.get("messages") or body.get("input") or ())
        if left < min(longest, SHORTEST):
            raise over_limit(
                f"does not set {field!r}, and its log probabilities could be too many",
                most,
                "max_logprobs_values",
                field,
            )
        longest = min(longest, left)
    body[field] = longest
    return True


def count_token_ids(prompt: Any) -> int:
    """Return how many token ids a prompt, or a list of prompts, has."""
    if not isinstance(prompt, list):
        return 0
    return sum(len(item) if isinstance(item, list) else 1 for item in prompt)
