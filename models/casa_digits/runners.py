"""Runs conversations on a model: the eager reference in this process. `endpoint.py` runs them on a server."""

from pathlib import Path
from typing import Any, Protocol

import torch

from casa_engine.checkpoints import load_model
from casa_engine.live import LiveSettings, eager_stream
from casa_engine.live.stream_format import StreamFormat

MAX_ANSWER_TOKENS = 16
Message = dict[str, Any]


class Runner(Protocol):
    """Answers a conversation, whose images are parts `{"type": "image", "image": PIL image}`."""

    def answer(self, messages: list[Message]) -> str:
        """Returns the assistant's next words, greedily decoded."""
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

    @torch.inference_mode()
    def answer(self, messages: list[Message]) -> str:
        """Returns the model's answer; see `Runner`."""
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [item["image"] for message in messages for item in content_items(message) if item["type"] == "image"]
        inputs = self.processor(images=images, text=text)
        output = self.model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        return self.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def content_items(message: Message) -> list[dict[str, Any]]:
    """Return a message's content as a list of items, text alone as one item."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


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
