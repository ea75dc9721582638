"""Two ways to ask a model: the eager reference in this process, or an OpenAI-compatible endpoint."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import torch

from casa_engine.checkpoints import load_model
from casa_engine.live import LiveSettings, eager_stream
from casa_engine.live.stream_format import StreamFormat

MAX_ANSWER_TOKENS = 16
Message = dict[str, Any]


class Runner(Protocol):
    """Answers a conversation; images stand in it as `{"type": "image", "image": PIL image}`."""

    def answer(self, messages: list[Message]) -> str:
        """The assistant's next words, greedily decoded."""
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
        """See `Runner`."""
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [item["image"] for message in messages for item in _items(message) if item["type"] == "image"]
        inputs = self.processor(images=images, text=text)
        output = self.model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        return self.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class EndpointRunner:
    """A running server.

    Args:
        base_url: Such as http://127.0.0.1:8000/v1.
        model: Its name there; None takes the only one served.
    """

    def __init__(self, base_url: str, model: str | None = None) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ImportError("--base-url needs the openai client: pip install 'casa-engine[serving]'") from error
        self.client = OpenAI(base_url=base_url, api_key="none")
        self.model = model or self.client.models.list().data[0].id

    def answer(self, messages: list[Message]) -> str:
        """See `Runner`."""
        sent = [{**message, "content": [_for_endpoint(item) for item in _items(message)]} for message in messages]
        reply = self.client.chat.completions.create(
            model=self.model, messages=sent, temperature=0.0, max_tokens=MAX_ANSWER_TOKENS
        )
        return reply.choices[0].message.content or ""


def _items(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _for_endpoint(item: dict[str, Any]) -> dict[str, Any]:
    if item["type"] != "image":
        return item
    buffer = BytesIO()
    item["image"].save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


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
