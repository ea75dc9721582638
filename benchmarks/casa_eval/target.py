"""What answers: vLLM in this process, or a server. Requests are taken from a stream, a bounded number at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from casa_bench.backend import Message
from casa_engine.errors import InputError

# Of an answer: a server may ignore the number of tokens that it was asked for.
MAX_ANSWER_CHARACTERS = 10_000
# What Kyutai's script puts in front of the questions to models with "qwen" in their name.
QWEN, QWEN_SYSTEM_PROMPT = "qwen", "You are a helpful assistant."


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        key: What the caller knows it by.
        messages: As `CasaProcessor.apply_chat_template` takes them: roles, and content as a list of texts and images.
        max_new_tokens: The longest answer.
    """

    key: Any
    messages: list[Message]
    max_new_tokens: int


# An answer, or what was wrong with this one request.
Reply = str | InputError


class Target(Protocol):
    """A model that answers greedily.

    Attributes:
        name: `engine` or `endpoint`.
        model: Its name.
        about: For the report: model, fusion, device.
    """

    name: str
    model: str
    about: dict[str, Any]

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Reply]]:
        """Answer requests, in the order in which they end; the next is taken when there is room for it.

        Raises:
            InputError: The model answers nobody any more.
        """

    def close(self) -> None:
        """Free everything."""


def question(prompt: str, images: list[Any], system_prompt: str) -> list[Message]:
    """Return the conversation of one question: images, then the prompt, behind a system prompt if there is one."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
    system = [{"role": "system", "content": [{"type": "text", "text": system_prompt}]}] if system_prompt else []
    return [*system, {"role": "user", "content": content}]


def default_system_prompt(model: str | Path) -> str:
    """Return the system prompt of the protocol for a model of this name or path, "" for none.

    A path counts as given and as it is: a downloaded snapshot's own folder is called by its hash.
    """
    names = (str(model), str(model.resolve())) if isinstance(model, Path) else (model,)
    return QWEN_SYSTEM_PROMPT if any(QWEN in name.lower() for name in names) else ""


def checked_answer(text: str | None) -> Reply:
    """Return an answer, or what is wrong with it."""
    text = text or ""
    if len(text) > MAX_ANSWER_CHARACTERS:
        return InputError(f"the answer has {len(text):,} characters; expected up to {MAX_ANSWER_CHARACTERS:,}.")
    return text
