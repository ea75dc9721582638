"""The plugin's full CUDA graphs on a CPU: vLLM's managers capture and choose, a replay is the captured forward pass.

Like a graph it reads the tensors with which it was captured, whatever the step has written there since. Self-attention
alone is given each step's own metadata: that of CPUs is made for no graph.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from casa_vllm.attention_metadata import GraphSupport
from casa_vllm.v2_chunk_graphs import CasaGPUModelRunner, ChunkGraphManager


def _capture(manager, create_forward_fn, progress_bar_desc=""):
    """Stand in for `CudaGraphManager.capture`."""
    for descs in manager._capture_descs.values():
        for desc in descs:
            forward = create_forward_fn(desc, warmup=False)
            forward(CUDAGraphMode.NONE)
            manager.graphs[desc] = SimpleNamespace(replay=partial(forward, CUDAGraphMode.NONE))
    manager._graphs_captured = True


def use_graphs(runner, sizes, patch):
    """Give a runner graphs of these numbers of tokens; return the batches that they replay, as they come.

    Args:
        runner: vLLM's second runner, on a CPU.
        sizes: Ascending.
        patch: pytest's monkeypatch, which undoes it all.
    """
    compilation = runner.compilation_config
    patch.setattr(compilation, "cudagraph_capture_sizes", sizes)
    patch.setattr(compilation, "max_cudagraph_capture_size", sizes[-1])
    patch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
    patch.setattr(CudaGraphManager, "capture", _capture)
    patch.setattr(runner, "__class__", type("Runner", (CasaGPUModelRunner, type(runner)), {}))
    for groups in runner.attn_groups:
        for group in groups:
            vars(group.get_metadata_builder(0)).pop("_graph_tensors", None)  # of other sizes
    replays = _share_metadata(runner.model_state, patch)
    manager = ChunkGraphManager(runner.vllm_config, runner.device, runner.decode_query_len)
    patch.setattr(runner, "cudagraph_manager", manager)
    manager.capture(
        runner.model,
        runner.model_state,
        runner.input_buffers,
        None,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
    )
    return replays


def _share_metadata(state, patch):
    """Have replays see self-attention's metadata of their step; CA layers see what `prepare_attn` gave at capture."""
    caches = [layer for layer in state._layers] + [layer.text_cache for layer in state._layers if layer.sees_text]
    of_ca = {cache.layer_name for cache in caches}
    captured, replays, prepare = [], [], type(state).prepare_attn

    def prepare_attn(state, batch, mode, tables, slots, groups, *args, for_capture=False, **kwargs):
        if for_capture:
            captured.append(prepare(state, batch, mode, tables, slots, groups, *args, for_capture=True, **kwargs))
            return captured[-1]
        # First: in the model state the later call counts.
        alone = replace(batch, max_query_len=None)
        metadata = prepare(state, alone, CUDAGraphMode.NONE, tables, slots, groups, *args, **kwargs)
        if mode == CUDAGraphMode.FULL:
            replays.append(batch)
            ca_groups = [[group for group in part if _is_of_ca(group)] for part in groups]
            prepare(state, batch, mode, tables, slots, ca_groups, *args, **kwargs)
            for known in captured:
                known.update({name: value for name, value in metadata.items() if name not in of_ca})
        return metadata

    patch.setattr(type(state), "prepare_attn", prepare_attn)
    return replays


def _is_of_ca(group):
    return isinstance(group.get_metadata_builder(0), GraphSupport)
