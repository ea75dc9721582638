"""Runs prompts through vLLM in this process and through the eager model. Test support only."""

import os

# Before vLLM is imported: the engine in this process, little memory, no compilation.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from casa_engine.checkpoints import load_model, load_processor

# On a GPU the engine runs as it would in production: compiled, with CUDA graphs.
ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
BARE_IMAGE = "<|image_pad|>"
# Chosen so that a page of the text groups is cheap to fill.
BLOCK_SIZE = 32
# More than any test takes: an engine that makes no progress fails.
MAX_STEPS = 20_000


def picture(seed: int, width: int = 56, height: int = 56) -> Image.Image:
    """A noise image; equal arguments give equal pixels."""
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@dataclass(frozen=True)
class Prompt:
    """Text with one marker per image."""

    text: str
    images: tuple[Image.Image, ...] = ()
    cache_salt: str | None = None

    def for_vllm(self) -> dict[str, Any]:
        data: dict[str, Any] = {"prompt": self.text}
        if self.images:
            data["multi_modal_data"] = {"image": list(self.images)}
        if self.cache_salt is not None:
            data["cache_salt"] = self.cache_salt
        return data


@dataclass
class Answer:
    """Generated tokens and the logprob of each."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def answer_of(completion: Any) -> Answer:
    """Read one of vLLM's completions."""
    tokens = list(completion.token_ids)
    steps = zip(tokens, completion.logprobs or (), strict=True)
    return Answer(tokens, [step[token].logprob for token, step in steps])


class Eager:
    """The eager model as oracle; remembers what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.model, self.processor = load_model(folder), load_processor(folder)
        self._answers: dict[Any, Answer] = {}

    def __call__(self, prompt: Prompt, num_tokens: int) -> Answer:
        key = (prompt.text, tuple(image.tobytes() for image in prompt.images), num_tokens)
        if key not in self._answers:
            self._answers[key] = self._generate(prompt, num_tokens)
        return self._answers[key]

    @torch.inference_mode()
    def _generate(self, prompt: Prompt, num_tokens: int) -> Answer:
        batch = dict(self.processor(images=list(prompt.images) or None, text=prompt.text))
        cache, answer = self.model.new_cache(), Answer()
        for _ in range(num_tokens):
            output = self.model(**batch, past_key_values=cache, logits_to_keep=1)
            logprobs = output.logits[0, -1].float().log_softmax(-1)
            token = int(logprobs.argmax())
            answer.tokens.append(token)
            answer.logprobs.append(float(logprobs[token]))
            batch = {"input_ids": torch.tensor([[token]])}
        return answer


class Engine:
    """vLLM's synchronous engine, with its scheduler within reach.

    Args:
        folder: The checkpoint.
        is_async: Two steps in flight.
        poison: Whether every page is spoiled when it is taken, so that one that is read and was not written shows.
        **options: Of vLLM's engine.
    """

    def __init__(self, folder: Path, *, is_async: bool = False, poison: bool = False, **options: Any) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor.abstract import Executor

        settings = {
            "model": str(folder),
            "dtype": "float32",
            "enforce_eager": not ON_GPU,
            "max_model_len": 1024,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 512,
            "block_size": BLOCK_SIZE,
            "num_gpu_blocks_override": 600,
            "disable_log_stats": False,
            "limit_mm_per_prompt": {"image": 250},
            "mm_processor_cache_gb": 0.1,
        }
        config = EngineArgs(**(settings | options)).create_engine_config()
        # The CPU platform switches it off; in one process it can be tested all the same.
        config.scheduler_config.async_scheduling = is_async
        self.engine = LLMEngine(vllm_config=config, executor_class=Executor.get_class(config), log_stats=True)
        self._count = 0
        self._answers: dict[str, Answer] = {}
        self.is_priority = config.scheduler_config.policy == "priority"
        if poison:
            self._poison_taken_pages()

    @property
    def scheduler(self) -> Any:
        return self.engine.engine_core.engine_core.scheduler

    @property
    def images(self) -> Any:
        """The manager of the (first) image group."""
        return self.scheduler.image_managers[0]

    @property
    def num_free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def answered(self) -> set[str]:
        """Requests of the run that goes on which have their answer."""
        return set(self._answers)

    def add(self, prompt: Prompt, num_tokens: int, **options: Any) -> str:
        """Queue a greedy request; return its id."""
        return self.add_rendered(self.render(prompt), num_tokens, **options)

    def add_rendered(
        self, prompt: Any, num_tokens: int, extra_args: dict[str, Any] | None = None, **options: Any
    ) -> str:
        """Queue what `render` made; return its id."""
        from vllm import SamplingParams

        self._count += 1
        params = SamplingParams(
            temperature=0, max_tokens=num_tokens, logprobs=0, ignore_eos=True, extra_args=extra_args
        )
        name = f"request-{self._count}"
        self.engine.add_request(name, prompt, params, **options)
        return name

    def send_chunk(self, session: str, prompt: Prompt, num_tokens: int) -> None:
        """Queue a session's next chunk, the first one too, the way `AsyncLLM` does."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=num_tokens,
            logprobs=0,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        request = self.engine.input_processor.process_inputs(
            session, self.render(prompt), params, supported_tasks=("generate",), resumable=True
        )
        request.external_req_id = session
        self.engine.output_processor.add_request(request, None)
        # In processes of their own the two do not share a list that both let grow.
        request.prompt_token_ids = list(request.prompt_token_ids)
        self.engine.engine_core.add_request(request)

    def answer_chunk(self, session: str) -> tuple[Answer, Any]:
        """Step until the session's chunk has ended; its answer and the last output's completion."""
        answer = Answer()
        for _ in range(200):
            for output in self._step():
                if output.request_id == session:
                    completion = output.outputs[0]
                    part = answer_of(completion)
                    answer = Answer(answer.tokens + part.tokens, answer.logprobs + part.logprobs)
                    if completion.finish_reason is not None:
                        return answer, completion
        raise AssertionError("200 steps without an answer")

    def render(self, prompt: Prompt) -> Any:
        """What the renderer makes of a prompt."""
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        renderer = self.engine.renderer
        parsed = parse_model_prompt(self.engine.model_config, prompt.for_vllm())
        return renderer.render_cmpl([parsed], renderer.default_cmpl_tok_params)[0]

    def run(self, each_step: Callable[[], None] | None = None) -> dict[str, Answer]:
        """Step until nothing is left to do; answers by request id."""
        return self.run_until(lambda _: not self.engine.has_unfinished_requests(), each_step)

    def run_until(
        self, is_done: Callable[[dict[str, Answer]], bool], each_step: Callable[[], None] | None = None
    ) -> dict[str, Answer]:
        """Step until the answers, by request id, are what is waited for."""
        for _ in range(MAX_STEPS):
            if is_done(self._answers):
                answers, self._answers = self._answers, {}
                return answers
            self._step()
            if each_step is not None:
                each_step()
        raise AssertionError(f"{MAX_STEPS} steps, and still something to do")

    def _step(self) -> list[Any]:
        """One step; answers that it ends wait for `run_until`."""
        outputs = self.engine.step()
        for output in outputs:
            if output.finished and output.outputs:
                self._answers[output.request_id] = answer_of(output.outputs[0])
        return outputs

    def ask(self, prompts: list[Prompt], num_tokens: int, **options: Any) -> list[Answer]:
        """Answers of prompts that run together."""
        names = [self.add(prompt, num_tokens, **options) for prompt in prompts]
        answers = self.run()
        return [answers[name] for name in names]

    def _poison_taken_pages(self) -> None:
        """Fill pages in the step that takes them, before its worker runs: NaN for images, for text what spoils it."""
        pool, scheduler = self.scheduler.kv_cache_manager.block_pool, self.scheduler
        layers = self.engine.vllm_config.compilation_config.static_forward_context.values()
        caches = {layer.kv_cache.data_ptr(): layer.kv_cache for layer in layers if hasattr(layer, "kv_cache")}
        assert all(len(cache) == pool.num_gpu_blocks for cache in caches.values())
        taken: list[int] = []
        get_new_blocks, schedule = pool.get_new_blocks, scheduler.schedule

        def note_new_blocks(count: int) -> Any:
            blocks = get_new_blocks(count)
            taken.extend(block.block_id for block in blocks)
            return blocks

        def schedule_and_poison(*args: Any) -> Any:
            output = schedule(*args)
            rows = [blocks for images in scheduler.image_managers for blocks in images.req_to_blocks.values()]
            images = {block.block_id for blocks in rows for block in blocks}.intersection(taken)
            for cache in caches.values():
                # vLLM's attention on CPUs multiplies what stands behind a text's end in its page by zero.
                cache[taken] = 1e4
                cache[list(images)] = float("nan")
            taken.clear()
            return output

        pool.get_new_blocks, scheduler.schedule = note_new_blocks, schedule_and_poison

    def forget_text(self) -> None:
        """Drop what is cached of finished requests."""
        assert self.scheduler.reset_prefix_cache()

    def close(self) -> None:
        """Free the engine's memory."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.engine.engine_core.shutdown()
        del self.engine
        cleanup_dist_env_and_memory()
        gc.collect()


def assert_same(answers: list[Answer], expected: list[Answer], tolerance: float = 1e-3) -> None:
    """Greedy tokens identical, logprobs within the tolerance."""
    for index, (answer, wanted) in enumerate(zip(answers, expected, strict=True)):
        assert answer.tokens == wanted.tokens, f"prompt {index}"
        np.testing.assert_allclose(answer.logprobs, wanted.logprobs, atol=tolerance, rtol=0, err_msg=f"prompt {index}")
