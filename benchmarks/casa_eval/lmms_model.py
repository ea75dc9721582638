"""The model `casa` of lmms-eval: a checkpoint in this process, or a server. Prompts and metrics are lmms-eval's own.

lmms-eval --model casa --model_args model=FOLDER --tasks docvqa_val
lmms-eval --model casa --model_args base_url=http://localhost:8000/v1 --tasks mme
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger
from PIL import Image

from casa_bench.backend import Message
from casa_engine.errors import InputError
from casa_engine.image_preparation import as_image
from casa_eval.images import scaled_down
from casa_eval.runner import Protocol
from casa_eval.target import Request, Target, default_system_prompt

CONCURRENCY = 16


class Casa(lmms):
    """See `lmms_eval.api.model.lmms`.

    Args:
        model: A checkpoint's folder; or
        base_url: the address of an OpenAI-compatible server.
        served_model: The model's name there; default: the first that it serves.
        api_key: Its key.
        image_size: Images of more than this squared are scaled down, px.
        max_new_tokens: The longest answer where a task says nothing.
        system_prompt: Default: as `casa eval`.
        batch_size: Questions that are open at once; lmms-eval's `--batch_size`.
        dtype: Of a checkpoint, as vLLM's option.
        kv_cache_gib: Of a checkpoint: size of the KV cache.
        enforce_eager: Of a checkpoint: whether not to compile it.
        device: Unused: vLLM's is taken. Passed by lmms-eval.
        max_batch_size: Unused. Passed by lmms-eval.

    Raises:
        CasaError: There is no such model or server.
    """

    is_simple = False

    def __init__(
        self,
        model: str | None = None,
        base_url: str | None = None,
        served_model: str | None = None,
        api_key: str | None = None,
        image_size: int = Protocol.image_size,
        max_new_tokens: int = Protocol.max_new_tokens,
        system_prompt: str | None = None,
        batch_size: int | str = CONCURRENCY,
        dtype: str = "auto",
        kv_cache_gib: float | None = None,
        enforce_eager: bool = False,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if (model is None) == (base_url is None):
            raise InputError("expected one of model=FOLDER and base_url=ADDRESS in --model_args.")
        concurrency = int(batch_size) if str(batch_size).isdigit() else CONCURRENCY
        self.target: Target
        if base_url is not None:
            from casa_eval.endpoint_target import EndpointTarget

            # Not only from --model_args, which lmms-eval writes into its results.
            key = api_key or os.environ.get("OPENAI_API_KEY")
            self.target = EndpointTarget(base_url, served_model, key, concurrency=concurrency)
        else:
            from casa_bench.engine_backend import EngineSettings
            from casa_eval.engine_target import EngineTarget

            self.target = EngineTarget(
                Path(str(model)),
                EngineSettings(dtype, kv_cache_gib, enforce_eager),
                concurrency=concurrency,
                image_size=image_size,
                max_new_tokens=max_new_tokens,
            )
        self._image_size, self._max_new_tokens = image_size, max_new_tokens
        default_prompt = default_system_prompt(self.target.model if model is None else Path(str(model)))
        self._system_prompt = default_prompt if system_prompt is None else system_prompt

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer questions; one that gets no answer is an empty text, and an error in the log."""
        answers = [""] * len(requests)
        for request, reply in self.target.answer(self._questions(requests)):
            number, stops = request.key
            if isinstance(reply, str):
                answers[number] = cut(reply, stops)
            else:
                logger.error(f"casa: question {number} has no answer: {reply}")
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: no task of the protocol asks back."""
        raise NotImplementedError("casa answers one question at a time; choose tasks of one round.")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: an endpoint gives no likelihood of a text that it did not write."""
        raise NotImplementedError("casa generates; choose tasks of output_type generate_until.")

    def clean(self) -> None:
        """See `lmms.clean`; the model is freed."""
        self.target.close()
        super().clean()

    def _questions(self, requests: list[Instance]) -> Iterator[Request]:
        for number, instance in enumerate(requests):
            _, doc_to_messages, settings, doc_id, task, split = instance.args
            messages = as_messages(doc_to_messages(self.task_dict[task][split][doc_id]), self._image_size)
            if self._system_prompt and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self._system_prompt}]})
            stops = settings.get("until") or []
            key = (number, [stops] if isinstance(stops, str) else list(stops))
            yield Request(key, messages, int(settings.get("max_new_tokens") or self._max_new_tokens))


def as_messages(given: list[Mapping[str, Any]], image_size: int) -> list[Message]:
    """Return lmms-eval's messages as ours, images scaled down.

    Raises:
        InputError: Something else than texts and images is shown.
    """
    return [
        {"role": message["role"], "content": [as_item(item, image_size) for item in message["content"]]}
        for message in given
    ]


def as_item(item: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Return one of lmms-eval's content items as ours.

    Raises:
        InputError: It is neither a text nor an image.
    """
    if item["type"] == "text":
        return {"type": "text", "text": item["text"]}
    if item["type"] != "image" or not isinstance(item["url"], Image.Image):
        raise InputError(f"the task shows {item['type']!r}; expected texts and images.")
    return {"type": "image", "image": scaled_down(as_image(item["url"]), image_size)}


def cut(answer: str, stops: list[str]) -> str:
    """Return an answer up to the first of these texts."""
    for stop in filter(None, stops):
        answer = answer.partition(stop)[0]
    return answer
