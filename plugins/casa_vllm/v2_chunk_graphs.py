"""Full CUDA graphs for steps with short prefills: the text of live sessions' frames is one replay.

vLLM has full graphs for steps in which every request decodes one token, and piecewise ones for all others, whose
attention runs between the pieces: of the 2B model 57 replays and 140 launches between them. It also knows full graphs
for requests of any length, which it captures for speculative decoding alone (`varlen_decode`). Attention that can run
in them (FlashAttention 3, Triton's, CA) is planned for the longest query that a graph may get, at capture as in a step:

    tokens of a step           1 each, all decode        any, up to N              more than N
    vLLM alone                 full graph                piecewise graphs          no graph
    here                       the same                  full graph                the same

N is vLLM's largest size of a graph (`max_cudagraph_capture_size`), and the sizes are vLLM's. The piecewise graphs would
never be replayed: they are not captured. A decode step without a graph of its own takes one of the others: of 97 to 100
sequences with `max_num_seqs` 100, where the next size is 104. Where vLLM profiles the memory of graphs it captures all
of the others, not a sample: they are captured twice, which costs time at the start alone.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.attn_utils import get_attn_cg_support
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

# vLLM's handler shows what loggers below its own say, and nothing else.
logger = init_logger("vllm.casa_graphs")


class ChunkGraphManager(ModelCudaGraphManager):
    """vLLM's graphs of decode steps, and its graphs of requests of any length for all other short steps.

    Args:
        vllm_config: The engine's configuration.
        device: Of the graphs.
        decode_query_len: Tokens of a request that decodes.

    Attributes:
        chunks: The graphs of requests of any length.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, decode_query_len: int) -> None:
        super().__init__(vllm_config, device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len)
        self.chunks = ModelCudaGraphManager(
            vllm_config,
            device,
            CUDAGraphMode.FULL_DECODE_ONLY,
            decode_query_len=vllm_config.compilation_config.max_cudagraph_capture_size,
            varlen_decode=True,
        )

    def needs_capture(self) -> bool:
        """Return whether there is a graph of either kind."""
        return super().needs_capture() or self.chunks.needs_capture()

    def capture(self, *args: Any, **kwargs: Any) -> None:
        """Capture all graphs; first those that take more memory, in which the others find room."""
        self.chunks.capture(*args, **{**kwargs, "progress_bar_desc": "Capturing CUDA graphs of short prefills"})
        super().capture(*args, **kwargs)

    def dispatch(self, num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> BatchExecutionDescriptor:
        """Return the graph of a step; the arguments are vLLM's."""
        found = super().dispatch(num_reqs, num_tokens, *args, **kwargs)
        if found.cg_mode == CUDAGraphMode.FULL:
            return found
        # vLLM 0.32 tells no length of a prefill, which it keeps out of these graphs.
        return self.chunks.dispatch(num_reqs, num_tokens, *args, **{**kwargs, "max_query_len": num_tokens})

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> Any:
        """Replay a graph; return hidden states."""
        if desc in self.chunks.graphs:
            return self.chunks.run_fullgraph(desc)
        return super().run_fullgraph(desc)


class CasaGPUModelRunner(GPUModelRunner):
    """vLLM's runner with graphs of short prefills."""

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Stock, then replaces the manager of graphs where attention may run in all of them."""
        super().initialize_kv_cache(*args, **kwargs)
        mode = self.cudagraph_manager.cudagraph_mode
        has_mixed_graphs = mode.decode_mode() == CUDAGraphMode.FULL and mode.mixed_mode() != CUDAGraphMode.NONE
        support = get_attn_cg_support(self.attn_groups, self.vllm_config)
        if has_mixed_graphs and support.min_cg_support == AttentionCGSupport.ALWAYS:
            self.cudagraph_manager = ChunkGraphManager(self.vllm_config, self.device, self.decode_query_len)
            longest = self.vllm_config.compilation_config.max_cudagraph_capture_size
            logger.info_once("Short prefills run in full CUDA graphs: steps of up to %d tokens.", longest)
        elif has_mixed_graphs:
            logger.info_once("Short prefills run without full CUDA graphs: %s has none.", support.min_cg_attn_backend)

    def prepare_inputs(
        self, scheduler_output: Any, batch_req_state: Any, batch_desc: BatchExecutionDescriptor, *args: Any
    ) -> InputBatch:
        """Stock; the batch keeps what its graph was promised of the length of queries."""
        batch = super().prepare_inputs(scheduler_output, batch_req_state, batch_desc, *args)
        batch.max_query_len = batch_desc.max_query_len
        return batch


class CasaGPUWorker(Worker):
    """vLLM's worker with that runner."""

    def init_device(self) -> None:
        """Stock, which makes a runner of vLLM's own class: there is no hook to name another.

        Raises:
            RuntimeError: The runner is of another class. CA's builders promise graphs of any step wherever this is the
                worker (`GraphSupport`), and only `CasaGPUModelRunner` keeps that promise.
        """
        super().init_device()
        if self.vllm_config.is_mm_encoder_only:
            return  # vLLM's runner for that has no text model, and no graphs of one
        made = type(self.model_runner)
        if made is not GPUModelRunner:
            raise RuntimeError(
                f"vLLM's runner is a {made.__module__}.{made.__qualname__}; expected {GPUModelRunner.__module__}."
                f"{GPUModelRunner.__qualname__} itself, to which casa_vllm adds CUDA graphs of short prefills. Remove "
                f"what replaces the runner, or start with --worker-cls {Worker.__module__}.{Worker.__qualname__}, "
                "without these graphs."
            )
        self.model_runner.__class__ = CasaGPUModelRunner
