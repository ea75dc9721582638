"""`--model`: vLLM with the CASA plugin in this process, with the defaults of `casa serve`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from casa_bench.backend import Needs
from casa_bench.engine_backend import (
    EngineSettings,
    longest_text,
    refusal_as_input_error,
    render,
    shut_down,
    start_engine,
)
from casa_engine.checkpoints import load_processor
from casa_engine.errors import InputError
from casa_engine.originals.views import resolve_checkpoint
from casa_eval.target import Reply, Request, checked_answer
from casa_serving.engine_defaults import read_checkpoint, runs_on_cpu

# Room for a prompt's text; the longest of the published sets have a few hundred tokens.
PROMPT_TOKENS = 3072


class EngineTarget:
    """See `Target`.

    Args:
        folder: The checkpoint, ours or a published one.
        settings: Of vLLM.
        concurrency: Requests at once.
        image_size: Side of the largest image, px.
        max_new_tokens: The longest answer.

    Raises:
        CheckpointError: The folder holds no CASA model.
        InputError: The engine cannot be started so.
    """

    name = "engine"

    def __init__(
        self, folder: Path, settings: EngineSettings, *, concurrency: int, image_size: int, max_new_tokens: int
    ) -> None:
        self.model = folder.resolve().name
        folder = resolve_checkpoint(folder)
        config = read_checkpoint(folder)
        needs = Needs(1, image_size, PROMPT_TOKENS + max_new_tokens, concurrency)
        max_model_len = min(longest_text(config, needs), config.text_config.max_position_embeddings)
        self.processor = load_processor(folder)
        self.engine = start_engine(folder, config, max_model_len, needs, settings)
        self._concurrency = concurrency
        # What generation_config.json asks for beside the choice of tokens, as `vllm serve` does.
        self._defaults = {
            name: value
            for name, value in self.engine.model_config.get_diff_sampling_param().items()
            if name == "repetition_penalty"
        }
        self.about = {
            "fusion": config.fusion,
            "backbone": config.text_config.model_type,
            "device": "cpu" if runs_on_cpu() else "cuda",
            "dtype": str(self.engine.model_config.dtype).removeprefix("torch."),
            "enforce_eager": settings.enforce_eager,
        }
        self._num_requests = 0

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Reply]]:
        """See `Target`."""
        waiting, is_over = iter(requests), False
        running: dict[str, Request] = {}
        while True:
            while not is_over and len(running) < self._concurrency:
                request = next(waiting, None)
                is_over = request is None
                if request is None:
                    break
                try:
                    running[self._add(request)] = request
                except InputError as error:
                    yield request, error
            if not running:
                return
            for output in self.engine.step():
                if output.finished:
                    yield running.pop(output.request_id), answer_of(output.outputs[0])

    def close(self) -> None:
        """See `Target`."""
        shut_down(self.engine)
        del self.engine

    def _add(self, request: Request) -> str:
        """Give a request to the engine; return its id.

        Raises:
            InputError: The prompt does not fit into the engine.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        text = self.processor.apply_chat_template(request.messages, add_generation_prompt=True)
        items = [item for message in request.messages for item in message["content"]]
        images = [item["image"] for item in items if item["type"] == "image"]
        prompt: dict[str, Any] = {"prompt": text} | ({"multi_modal_data": {"image": images}} if images else {})
        params = SamplingParams(
            temperature=0,
            max_tokens=request.max_new_tokens,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **self._defaults,
        )
        self._num_requests += 1
        name = f"eval-{self._num_requests}"
        rendered = render(self.engine, prompt)
        with refusal_as_input_error():
            self.engine.add_request(name, rendered, params)
        return name


def answer_of(completion: Any) -> Reply:
    """Return the text of a finished request, or why it has none."""
    if completion.finish_reason not in ("stop", "length"):
        return InputError(f"the engine ended the answer: {completion.finish_reason} ({completion.stop_reason}).")
    return checked_answer(completion.text)
