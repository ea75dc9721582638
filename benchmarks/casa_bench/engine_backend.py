"""`--backend engine`: vLLM with the CASA plugin in this process, without a server, so that its pages can be counted."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from casa_bench.backend import Answer, Message, Needs, Turn
from casa_bench.frame_chunks import FrameChunks
from casa_bench.process_use import Meter
from casa_engine.checkpoints import load_processor
from casa_engine.configuration import CasaConfig
from casa_engine.errors import InputError
from casa_engine.live.stream_format import StreamFormat
from casa_engine.originals.views import resolve_checkpoint
from casa_serving.engine_defaults import engine_arguments, read_checkpoint, runs_on_cpu, set_environment


@dataclass(frozen=True)
class EngineSettings:
    """What is set of vLLM beside the defaults of `casa serve`.

    Attributes:
        dtype: vLLM's option.
        kv_cache_gib: Size of the KV cache; None is vLLM's default.
        enforce_eager: Whether the model is not compiled.
    """

    dtype: str = "auto"
    kv_cache_gib: float | None = None
    enforce_eager: bool = False


class EngineBackend:
    """See `Backend`.

    Args:
        folder: The checkpoint.
        needs: What will be asked at most; the engine is made as large. A conversation may be longer than the model was
            made for, as in the published benchmark: its cost is right, its words are not.
        settings: Of vLLM.

    Raises:
        CheckpointError: The folder holds no CASA model.
        InputError: The engine cannot be started so.
    """

    name = "engine"

    def __init__(self, folder: Path, needs: Needs, settings: EngineSettings) -> None:
        folder = resolve_checkpoint(folder)
        config = read_checkpoint(folder)
        self.format = StreamFormat.from_checkpoint(folder)
        self.processor = load_processor(folder)
        self.engine = start_engine(folder, config, longest_text(config, needs), needs, settings)
        self.on_gpu = not runs_on_cpu()
        self.about = {
            "fusion": config.fusion,
            "device": "cuda" if self.on_gpu else "cpu",
            "dtype": str(self.engine.model_config.dtype).removeprefix("torch."),
            "enforce_eager": settings.enforce_eager,
        }
        self._num_requests = 0
        if not self.on_gpu:
            # The system counts what was touched: else memory would seem to grow until each page was in use once.
            worker = self.engine.engine_core.engine_core.model_executor.driver_worker.worker
            for pages in worker.model_runner.kv_caches:
                pages.zero_()

    @property
    def pool_bytes(self) -> int:
        """Size of vLLM's KV cache, which is one allocation of its start, whatever is in use."""
        config = self.engine.engine_core.engine_core.scheduler.kv_cache_config
        return max(tensor.size for tensor in config.kv_cache_tensors)

    def open_stream(self) -> EngineStream:
        """See `Backend`."""
        return EngineStream(self, self.new_name())

    def answer(self, chats: Sequence[Sequence[Message]], num_tokens: int) -> list[Answer]:
        """See `Backend`; the conversations run in the same steps."""
        from vllm.sampling_params import RequestOutputKind

        begun_s = time.perf_counter()
        open_requests: dict[str, _Progress] = {}
        for messages in chats:
            text = self.processor.apply_chat_template(list(messages), add_generation_prompt=True)
            images = [item["image"] for message in messages for item in message["content"] if item["type"] == "image"]
            name = self.new_name()
            prompt = render(self.engine, {"prompt": text, "multi_modal_data": {"image": images}})
            self.engine.add_request(name, prompt, sampling(num_tokens, RequestOutputKind.DELTA))
            open_requests[name] = _Progress()
        order = list(open_requests.values())
        while open_requests:
            for output in self.engine.step():
                progress = open_requests[output.request_id]
                progress.add(output.outputs[0].token_ids)
                if output.finished:
                    check_finish(output.outputs[0])
                    del open_requests[output.request_id]
        return [progress.answer(begun_s, self.format) for progress in order]

    def close(self) -> None:
        """See `Backend`."""
        shut_down(self.engine)
        del self.engine

    def new_name(self) -> str:
        """Return an id that no request has."""
        self._num_requests += 1
        return f"bench-{self._num_requests}"

    def kv_use(self, request_id: str) -> tuple[int, int]:
        """Return the positions in a request's text cache, and the bytes of all pages in use."""
        scheduler = self.engine.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        in_use = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # 1: the null block
        # All groups lie in one allocation: a page belongs to one of them at a time.
        page_bytes = self.pool_bytes // pool.num_gpu_blocks
        return scheduler.requests[request_id].num_computed_tokens, in_use * page_bytes


class EngineStream:
    """See `Stream`: one request whose prompt grows by chunks, as that of a live session.

    As in the published captioner's default, an answer's last token is not kept, and the stop token is read with the
    next frame.
    """

    def __init__(self, backend: EngineBackend, name: str) -> None:
        self._backend, self._name = backend, name
        self._chunks = FrameChunks(backend.format, folds_stop=True)
        self._meter = Meter(on_gpu=backend.on_gpu)

    def turn(self, frame: Image.Image, num_tokens: int) -> Turn:
        """See `Stream`."""
        from vllm.sampling_params import RequestOutputKind

        self._meter.start()
        begun_s = time.perf_counter()
        ids, _ = self._chunks.next(1)
        prompt = render(self._backend.engine, {"prompt_token_ids": ids, "multi_modal_data": {"image": [frame]}})
        prepared_s = time.perf_counter()
        params = sampling(num_tokens, RequestOutputKind.DELTA)
        add_chunk(self._backend.engine, self._name, prompt, params)
        progress = _Progress()
        is_open = True
        while is_open:
            for output in self._backend.engine.step():
                progress.add(output.outputs[0].token_ids)
                if output.outputs[0].finish_reason is not None:
                    check_finish(output.outputs[0])
                    is_open = False
        cpu_ms, memory_bytes = self._meter.read()
        kv_tokens, kv_bytes = self._backend.kv_use(self._name)
        # The whole cache is in it, which would hide everything else.
        memory_bytes += kv_bytes - self._backend.pool_bytes
        return Turn(
            ttft_ms=1000 * (progress.first_s - prepared_s),
            decode_ms=1000 * (progress.last_s - progress.first_s),
            tokens=len(progress.token_ids),
            prepare_ms=1000 * (prepared_s - begun_s),
            cpu_ms=cpu_ms,
            kv_tokens=kv_tokens,
            kv_bytes=kv_bytes,
            memory_bytes=memory_bytes,
        )

    def close(self) -> None:
        """See `Stream`."""
        self._backend.engine.abort_request([self._name])
        # Its pages are free; the runner learns it with the next step. Another stream may be open.
        self._backend.engine.step()


@dataclass
class _Progress:
    """The tokens of an answer so far, and when the first and the last came (seconds of the performance counter)."""

    token_ids: list[int] = field(default_factory=list)
    first_s: float = 0.0
    last_s: float = 0.0

    def add(self, token_ids: Sequence[int]) -> None:
        if token_ids:
            self.last_s = time.perf_counter()
            self.first_s = self.first_s or self.last_s
            self.token_ids += token_ids

    def answer(self, begun_s: float, format: StreamFormat) -> Answer:
        ttft_ms, total_ms = 1000 * (self.first_s - begun_s), 1000 * (self.last_s - begun_s)
        return Answer(format.text(self.token_ids), ttft_ms, total_ms, len(self.token_ids))


def add_chunk(engine: Any, name: str, prompt: Any, params: Any) -> None:
    """Send a chunk of a request that stays open, as `AsyncLLM` does: the synchronous engine has no call for it."""
    request = engine.input_processor.process_inputs(name, prompt, params, supported_tasks=("generate",), resumable=True)
    request.external_req_id = name
    engine.output_processor.add_request(request, None)
    # In processes of their own the two do not share a list that both let grow.
    request.prompt_token_ids = list(request.prompt_token_ids)
    engine.engine_core.add_request(request)


def render(engine: Any, prompt: dict[str, Any]) -> Any:
    """Return what vLLM's renderer makes of a prompt: ids, patches, hashes.

    Raises:
        InputError: The prompt does not fit into the engine.
    """
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    with refusal_as_input_error():
        parsed = parse_model_prompt(engine.model_config, prompt)
        return engine.renderer.render_cmpl([parsed], engine.renderer.default_cmpl_tok_params)[0]


@contextmanager
def refusal_as_input_error() -> Iterator[None]:
    """Raise InputError where vLLM refuses a prompt in the block; its own error of that is no ValueError."""
    from vllm.exceptions import VLLMValidationError

    try:
        yield
    except (ValueError, VLLMValidationError) as error:
        raise InputError(f"the engine refuses a prompt: {error}") from error


def sampling(num_tokens: int, output_kind: Any) -> Any:
    """Return vLLM's parameters for exactly so many greedy tokens."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, output_kind=output_kind
    )


def check_finish(completion: Any) -> None:
    """Raise InputError where the engine has ended a request otherwise than by its length."""
    if completion.finish_reason != "length":
        raise InputError(
            f"the engine ended a request: {completion.finish_reason} ({completion.stop_reason}). Ask for less, or give "
            "it more memory with --kv-cache-gib."
        )


def longest_text(config: CasaConfig, needs: Needs) -> int:
    """Return the longest text that a workload makes, in tokens."""
    vision = config.vision_config
    side = needs.image_px // (vision.patch_size * vision.spatial_merge_size) + 1
    image_tokens = 0 if config.is_cross_attention else side**2
    return needs.positions(image_tokens)


def start_engine(folder: Path, config: CasaConfig, max_model_len: int, needs: Needs, settings: EngineSettings) -> Any:
    """Start vLLM in this process with the defaults of `casa serve`.

    Raises:
        InputError: vLLM refuses a setting.
    """
    # Read when vLLM is imported. One process: pages, memory and processor time are all at hand.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    given: dict[str, Any] = {
        **({"mm_processor_cache_gb": 0} if needs.has_new_images else {}),
        "dtype": settings.dtype,
        "enforce_eager": settings.enforce_eager,
        "max_model_len": max_model_len,
        "max_num_seqs": max(needs.concurrency, 2),
    }
    if max_model_len > config.text_config.max_position_embeddings:
        given["hf_overrides"] = {"text_config": {"max_position_embeddings": max_model_len}}
    if settings.kv_cache_gib is not None:
        # The variable would win, and knows whole GiB only.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        given["kv_cache_memory_bytes"] = round(settings.kv_cache_gib * 2**30)
    arguments, variables = engine_arguments(config, embedded=False, on_cpu=runs_on_cpu(), live=False, given=given)
    set_environment(variables, live=False)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor

    try:
        engine_config = EngineArgs(model=str(folder), **arguments).create_engine_config()
        executor = Executor.get_class(engine_config)
        return LLMEngine(vllm_config=engine_config, executor_class=executor, log_stats=False)
    except ValueError as error:
        raise InputError(f"vLLM does not start: {error}") from error


def shut_down(engine: Any) -> None:
    """End an engine of this process and free what it holds; the caller drops its own reference."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    gc.collect()
