"""Runs conversations on a model: the eager reference in this process. `endpoint.py` runs them on a server."""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from casa_digits.forms import CALL_END, CALL_START, INTEGER, INTEGERS, STRING, Form
from casa_engine.checkpoints import load_model
from casa_engine.live import LiveSettings, eager_stream
from casa_engine.live.stream_format import StreamFormat

MAX_ANSWER_TOKENS = 16
MAX_CALL_TOKENS = 96
# What a grammar forces before a value of this type.
BEGINNINGS = {STRING: ' "', INTEGERS: " ["}
# What it allows nowhere in an integer.
OPENINGS = frozenset('"[{')
Message = dict[str, Any]


class Runner(Protocol):
    """Answers a conversation, whose images are parts `{"type": "image", "image": PIL image}`."""

    def answer(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """Return the assistant's next words, greedily decoded; tools have been offered all along."""
        ...

    def fill(self, messages: list[Message], form: Form | None) -> Any:
        """Return the assistant's next words read as JSON, with these fields or its own; None where they are none."""
        ...

    def call(self, messages: list[Message], tools: list[dict[str, Any]]) -> Message | None:
        """Return the assistant's next message, one call of a tool and nothing else, or None where it is not that."""
        ...


class Stream(Protocol):
    """A live session.

    Attributes:
        captions: What it has said and still holds in its text, in order.
    """

    @property
    def captions(self) -> list[str]:
        """Return what was said to frames."""
        ...

    def caption(self, frame: Image.Image) -> str:
        """Show a frame; return what is said to it, "" for silence."""
        ...

    def ask(self, question: str) -> str:
        """Ask between two frames; return the answer."""
        ...


class EagerRunner:
    """The eager model on the CPU, float32.

    Args:
        checkpoint: Its folder.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.model, self.format = load_model(checkpoint), StreamFormat.from_checkpoint(checkpoint)
        self.processor = self.format.processor
        tokenizer = self.processor.tokenizer
        self._openings = [token for token in range(len(tokenizer)) if OPENINGS & set(tokenizer.decode([token]))]

    def answer(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """Return the model's answer; see `Runner`."""
        return self._continue(messages, tools=tools)

    def fill(self, messages: list[Message], form: Form | None) -> Any:
        """Return the model's JSON; see `Runner`. Names, types and a value's end are given, as by a grammar."""
        if form is None:
            return read_json(self._continue(messages, max_tokens=MAX_CALL_TOKENS))
        return read_json(self._fill(messages, form, ""))

    def call(self, messages: list[Message], tools: list[dict[str, Any]]) -> Message | None:
        """Return the model's call; see `Runner`."""
        text = self._continue(messages, tools=tools, max_tokens=MAX_CALL_TOKENS)
        if not (text.startswith(CALL_START) and text.endswith(CALL_END)):
            return None
        call = read_json(text[len(CALL_START) : -len(CALL_END)])
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
            return None
        return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}

    def _fill(self, messages: list[Message], form: Form, text: str) -> str:
        """Return `text` and the object of this form after it."""
        for number, (name, kind) in enumerate(form.items()):
            text += f'{", " if number else "{"}"{name}":'
            if isinstance(kind, dict):
                text = self._fill(messages, kind, f"{text} ")
                continue
            begun = BEGINNINGS.get(kind, "")
            forbidden = self._openings if kind == INTEGER else None
            said = begun + self._continue(messages, text + begun, forbidden=forbidden)
            try:
                _, end = json.JSONDecoder().raw_decode(said.lstrip())
            except json.JSONDecodeError:
                return text + said
            text += f" {said.lstrip()[:end]}"
        return text + "}"

    @torch.inference_mode()
    def _continue(
        self,
        messages: list[Message],
        begun: str = "",
        tools: list[dict[str, Any]] | None = None,
        max_tokens: int = MAX_ANSWER_TOKENS,
        forbidden: list[int] | None = None,
    ) -> str:
        """Return what the model says after `begun`, which is given as the beginning of its answer.

        Args:
            messages: The conversation.
            begun: See above.
            tools: Tools that are offered.
            max_tokens: Most tokens that it says.
            forbidden: Tokens that it does not say.
        """
        text = self.processor.apply_chat_template(messages, tools=tools, add_generation_prompt=True) + begun
        images = [item["image"] for message in messages for item in content_items(message) if item["type"] == "image"]
        inputs = self.processor(images=images, text=text)
        limits = {} if forbidden is None else {"suppress_tokens": forbidden}  # An exported model's `generate` has none.
        output = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, **limits)
        return self.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def read_json(text: str) -> Any:
    """Return what a text says in JSON, or None."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def content_items(message: Message) -> list[dict[str, Any]]:
    """Return a message's content as a list of items, text alone as one item; of a call alone (None) there are none."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []


class EagerStream(eager_stream.EagerStream):
    """Live captioning with the eager model, as the checkpoint's live settings want it.

    Args:
        runner: Model and processor.
        instruction: The user's words.
        text_budget: Most text tokens kept.
    """

    def __init__(self, runner: EagerRunner, instruction: str, text_budget: int) -> None:
        settings = LiveSettings.for_checkpoint(runner.checkpoint, instruction=instruction, text_budget=text_budget)
        super().__init__(runner.model, runner.format, settings)

    @property
    def captions(self) -> list[str]:
        """What was said to frames that are still in the text."""
        return [item.caption for item in self.transcript.history if item.caption]
