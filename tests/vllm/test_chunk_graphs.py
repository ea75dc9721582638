"""Full CUDA graphs of short prefills: who gets the runner that has them, what it overrides of vLLM, which graph a step.

No engine and no GPU: what the graphs compute is in test_v2_runner.py.
"""

import inspect
import logging
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.version import Version
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.mm_encoder_model_runner import MMEncoderModelRunner

from casa_vllm import config_hook, v2_chunk_graphs
from casa_vllm.attention_metadata import GPU_WORKER
from casa_vllm.compat import VERSION
from casa_vllm.v2_chunk_graphs import CasaGPUModelRunner, CasaGPUWorker, ChunkGraphManager
from casa_vllm.v2_model_state import CasaModelState
from casa_vllm.window_states import WindowStates

HAS_MICROBATCHES = VERSION >= Version("0.32.0")
# Parameters of what is overridden, or whose arguments are handed on; the last of vLLM 0.32 alone.
PARAMETERS = {
    ModelCudaGraphManager.__init__: (
        "self vllm_config device cudagraph_mode decode_query_len lora_capture_cases varlen_decode",
        "ubatch_runner",
    ),
    ModelCudaGraphManager.needs_capture: ("self", ""),
    ModelCudaGraphManager.capture: (
        "self model model_state input_buffers intermediate_tensors block_tables attn_groups kv_cache_config "
        "pcp_manager has_lora use_aux_hidden_state_outputs lora_capture_hook progress_bar_desc",
        "",
    ),
    ModelCudaGraphManager.dispatch: (
        "self num_reqs num_tokens uniform_token_count num_active_loras max_query_len",
        "num_ubatches",
    ),
    ModelCudaGraphManager.run_fullgraph: ("self desc", ""),
    GPUModelRunner.initialize_kv_cache: ("self kv_cache_config is_profiling kv_cache_allocation_context", ""),
    GPUModelRunner.prepare_inputs: ("self scheduler_output batch_req_state batch_desc", "num_active_loras"),
    Worker.init_device: ("self", ""),
}


class OtherRunner(GPUModelRunner):
    """Of another plugin."""


@pytest.fixture
def config(checkpoints):
    """vLLM's configuration of a model with CA, as its platform of CPUs leaves it."""
    folder = str(checkpoints("tiny-llama", fusion="ca"))
    return EngineArgs(model=folder, dtype="float32", max_model_len=256, max_num_seqs=100).create_engine_config()


@pytest.mark.parametrize("function", PARAMETERS, ids=lambda function: function.__qualname__)
def test_what_is_overridden_is_what_it_was(function):
    common, newer = PARAMETERS[function]
    expected = common.split() + (newer.split() if HAS_MICROBATCHES else [])
    assert list(inspect.signature(function).parameters) == expected, (
        f"vLLM {VERSION} has changed {function.__qualname__}: read what plugins/casa_vllm/v2_chunk_graphs.py does with "
        "its arguments, then change this list"
    )


@pytest.mark.parametrize("kind", [BatchExecutionDescriptor, InputBatch], ids=lambda kind: kind.__name__)
def test_length_of_queries_is_where_it_was(kind):
    found = {field.name: (field.type, field.default) for field in fields(kind)}
    assert found.get("max_query_len") == (int | None, None), (
        f"vLLM {VERSION} has changed {kind.__name__}.max_query_len: read `CasaGPUModelRunner.prepare_inputs` and "
        "`CasaModelState._step` in plugins/casa_vllm, which tell decode from requests of any length by it"
    )


def test_the_worker_is_found_by_its_name():
    assert resolve_obj_by_qualname(GPU_WORKER) is CasaGPUWorker


@pytest.mark.parametrize(("given", "chosen"), [("auto", GPU_WORKER), ("their.own.Worker", "their.own.Worker")])
def test_the_worker_of_a_gpu(given, chosen, config, monkeypatch):
    """The hook, as on a GPU: a worker that somebody named stays."""
    config.scheduler_config.scheduler_cls = None
    config.parallel_config.worker_cls = given
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    monkeypatch.setattr(config_hook, "find_spec", lambda name: True)  # torchvision
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    config_hook.CasaConfigHook.verify_and_update_config(config)
    assert config.parallel_config.worker_cls == chosen


def largest_graph(num_seqs, step_tokens, largest=None, sizes=None):
    """What the hook leaves of `max_cudagraph_capture_size`; None is vLLM's own choice."""
    compilation = SimpleNamespace(max_cudagraph_capture_size=largest, cudagraph_capture_sizes=sizes)
    scheduler = SimpleNamespace(max_num_seqs=num_seqs, max_num_batched_tokens=step_tokens)
    config_hook._set_graph_sizes(SimpleNamespace(compilation_config=compilation, scheduler_config=scheduler))
    return compilation.max_cudagraph_capture_size


def test_graphs_of_few_sequences_hold_a_chunk_of_each():
    """Of 8 vLLM's largest has 16 tokens, and a live frame's text 20. Of 256 it has 512, of 512 on Blackwell 1,024."""
    found = {num_seqs: largest_graph(num_seqs, 8192) for num_seqs in (1, 8, 16, 18, 255, 256, 1024)}
    assert found == {1: 32, 8: 256, 16: 512, 18: 512, 255: 512, 256: None, 1024: None}
    assert largest_graph(8, 100) == 100, "no graph is larger than a step"
    assert largest_graph(8, 16) is None


@pytest.mark.parametrize("chosen", [{"largest": 64}, {"sizes": [1, 2, 4]}])
def test_sizes_of_graphs_that_somebody_chose_stay(chosen):
    assert largest_graph(8, 8192, **chosen) == chosen.get("largest")


def started_with(runner, monkeypatch, *, is_encoder_only=False):
    """The runner's class after the worker's start, for which vLLM made one of that class."""
    monkeypatch.setattr(Worker, "init_device", lambda self: setattr(self, "model_runner", object.__new__(runner)))
    worker = object.__new__(CasaGPUWorker)
    worker.vllm_config = SimpleNamespace(is_mm_encoder_only=is_encoder_only)
    worker.init_device()
    return type(worker.model_runner)


def test_the_runner_is_replaced(monkeypatch):
    assert started_with(GPUModelRunner, monkeypatch) is CasaGPUModelRunner


def test_another_runner_is_refused(monkeypatch):
    """The builders have promised graphs of any step, which it would capture as those of decode."""
    expected = r"OtherRunner; expected vllm\.v1\.worker\.gpu\.model_runner\.GPUModelRunner itself.*--worker-cls vllm\."
    with pytest.raises(RuntimeError, match=expected):
        started_with(OtherRunner, monkeypatch)


def test_a_runner_of_encoders_alone_stays(monkeypatch):
    assert started_with(MMEncoderModelRunner, monkeypatch, is_encoder_only=True) is MMEncoderModelRunner


@pytest.mark.parametrize(("num_tokens", "is_refused"), [(2, False), (3, True)])
@pytest.mark.parametrize("promised", [None, 1])
def test_a_graph_of_decode_has_a_token_each(num_tokens, promised, is_refused, monkeypatch):
    """Whatever a runner replays; another would attend wrongly, and say nothing."""
    state = object.__new__(CasaModelState)
    state._request_ids, state._windows = {"a", "b"}, WindowStates(4, 8, 8, 16)
    state._device_windows = SimpleNamespace(gpu=torch.zeros(0))
    monkeypatch.setattr(state, "_send_windows", lambda: None)
    for row in range(2):
        state._windows.add_row(row, [], 0)
    batch = SimpleNamespace(
        req_ids=["a", "b"],
        num_reqs=2,
        num_tokens=num_tokens,
        num_scheduled_tokens=np.array([1, num_tokens - 1], np.int32),
        num_computed_tokens_np=np.array([5, 7], np.int32),
        idx_mapping_np=np.arange(2),
        idx_mapping=torch.arange(2),
        max_query_len=promised,
    )
    if is_refused:
        with pytest.raises(RuntimeError, match="got 3 tokens of 2 requests; expected a token each"):
            state._step(batch, in_graph=True)
        assert state._step(batch, in_graph=False).plan.num_tokens == num_tokens
    else:
        assert state._step(batch, in_graph=True).plan is None


@pytest.fixture
def runner_with(config, monkeypatch, caplog):
    """A runner with caches, for attention of that support, with vLLM's sizes of graphs for 100 sequences on a GPU."""
    compilation = config.compilation_config
    compilation.cudagraph_capture_sizes = [1, 2, 4, *range(8, 201, 8)]
    compilation.max_cudagraph_capture_size = 200
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True))
    monkeypatch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
    logger = logging.getLogger("vllm")  # vLLM's loggers do not propagate further
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    caplog.set_level(logging.INFO, "vllm")

    def runner_of(support):
        def initialize(self, kv_cache_config, is_profiling=False):
            mode = CUDAGraphMode.FULL_AND_PIECEWISE
            self.cudagraph_manager = ModelCudaGraphManager(config, self.device, mode, self.decode_query_len)

        found = SimpleNamespace(min_cg_support=support, min_cg_attn_backend="Attention")
        monkeypatch.setattr(v2_chunk_graphs, "get_attn_cg_support", lambda groups, config: found)
        monkeypatch.setattr(GPUModelRunner, "initialize_kv_cache", initialize)
        runner = object.__new__(CasaGPUModelRunner)
        runner.vllm_config, runner.device, runner.decode_query_len = config, torch.device("cpu"), 1
        runner.attn_groups = []
        runner.initialize_kv_cache(None, is_profiling=True)
        runner.initialize_kv_cache(None)
        return runner

    return runner_of


def test_which_graph_a_step_has(runner_with, caplog):
    """Decode its own, all other steps of up to 200 tokens one of requests of any length; said once in the log."""
    manager = runner_with(AttentionCGSupport.ALWAYS).cudagraph_manager
    assert type(manager) is ChunkGraphManager
    assert caplog.text.count("Short prefills run in full CUDA graphs: steps of up to 200 tokens.") == 1
    manager._graphs_captured = manager.chunks._graphs_captured = True

    def graph(num_reqs, num_tokens, **kwargs):
        """Tokens and promised length of queries; of a prefill vLLM 0.32 tells no length."""
        uniform = 1 if num_reqs == num_tokens else None
        found = manager.dispatch(num_reqs, num_tokens, uniform, num_active_loras=0, **kwargs)
        return found.num_tokens if found.cg_mode == CUDAGraphMode.FULL else None, found.max_query_len

    assert graph(96, 96, max_query_len=1) == (96, None)
    # The next size is 104: more than there may be sequences, and so none of decode.
    assert {graph(count, count, max_query_len=1) for count in range(97, 101)} == {(104, 200)}
    assert graph(3, 21, max_query_len=19) == graph(1, 17, max_query_len=None) == (24, 200)
    assert graph(1, 200, max_query_len=200) == (200, 200)
    assert graph(1, 201, max_query_len=201) == (None, None)


def test_attention_without_such_graphs(runner_with, caplog):
    """vLLM's own graphs stay, and the log says why."""
    manager = runner_with(AttentionCGSupport.UNIFORM_BATCH).cudagraph_manager
    assert type(manager) is ModelCudaGraphManager
    assert caplog.text.count("Short prefills run without full CUDA graphs: Attention has none.") == 1
