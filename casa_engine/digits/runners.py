"""Two ways to ask a model: the eager reference in this process, or an OpenAI-compatible endpoint."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from casa_engine.cache import CasaCache
from casa_engine.checkpoints import load_model, load_processor
from casa_engine.tokenization import IMAGE_END, IMAGE_START, TURN_END, TURN_START

MAX_ANSWER_TOKENS = 16
NUM_DELIMITERS = 3  # of a frame in a stream: image start, image end, end of the caption
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
        self.model, self.processor = load_model(checkpoint), load_processor(checkpoint)

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


class EagerStream:
    """Live captioning with the eager model: one assistant turn that never ends, within a budget of text tokens.

    When the text would outgrow the budget, the text of the oldest frames is dropped, down to half of the budget, and
    the rest is read again: instructions first, then what was said, as text without images. Silent frames go first: the
    last caption must stay, because the next frame is compared with it.

    Args:
        runner: Model and processor.
        instruction: The user's words.
        text_budget: Most text tokens kept.
    """

    def __init__(self, runner: EagerRunner, instruction: str, text_budget: int) -> None:
        self.runner, self.text_budget = runner, text_budget
        self.ids = runner.processor.tokenizer.convert_tokens_to_ids
        self.start, self.end, self.stop = self.ids(IMAGE_START), self.ids(IMAGE_END), self.ids(TURN_END)
        text = f"{TURN_START}user\n{instruction}{TURN_END}\n{TURN_START}assistant\n"
        self.prompt: list[int] = runner.processor.tokenizer(text)["input_ids"]
        self.frames: list[list[int]] = []
        self.cache = CasaCache(runner.model.config)
        self.pending = list(self.prompt)

    @property
    def num_tokens(self) -> int:
        """Text tokens of the session so far."""
        return len(self.prompt) + sum(map(len, self.frames))

    @torch.inference_mode()
    def caption(self, frame: Image.Image) -> str:
        """Shows one frame; returns what the model says to it, "" for silence."""
        if self.num_tokens + 2 + MAX_ANSWER_TOKENS > self.text_budget:
            self._forget()
        vision = self.runner.processor.process_images([frame])
        ids = [*self.pending, self.start, self.end]
        logits = self._step(ids, insertion_points=torch.tensor([len(ids) - 1]), **vision)
        said: list[int] = []
        while (token := int(logits.argmax())) != self.stop and len(said) < MAX_ANSWER_TOKENS - 1:
            said.append(token)
            logits = self._step([token])
        self.pending = [self.stop]
        self.frames.append([self.start, self.end, *said, self.stop])
        return self.runner.processor.tokenizer.decode(said).strip()

    def _step(self, ids: list[int], **images: torch.Tensor) -> torch.Tensor:
        output = self.runner.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True, **images)
        return output.logits[0, -1]

    def _forget(self) -> None:
        self.frames = [frame for frame in self.frames if len(frame) > NUM_DELIMITERS]
        while self.frames and self.num_tokens > self.text_budget // 2:
            self.frames.pop(0)
        self.cache = CasaCache(self.runner.model.config)
        self.pending = self.prompt + [token for frame in self.frames for token in frame]
