"""Compares what vLLM's memory profiling allocates with what steps do. Test support only.

    python profiled_memory.py MODEL        a model of benchmarks/kernel_counts.py

The GPU's path on a CPU, Triton interpreted. Profiling is what the runner calls before there are caches: its encoder
runner with the most images of a step, then a forward pass without metadata. The steps are those images written into
pages, and CA of a prefill of as many tokens. Prints JSON: peak bytes of "profile_images", "write_images",
"profile_text" and "attend_text".
"""

import json
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernel_counts
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner

from casa_engine.checkpoints import default_processor

NUM_TOKENS, BLOCK_SIZE = 512, 16
MAX_IMAGE_TOKENS = 128


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors made in a block that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._uses: Counter[int] = Counter()
        self.is_in_triton = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.is_in_triton:  # the interpreter's own
            return result
        before = {x.untyped_storage().data_ptr() for x in tensors_of((args, kwargs))}
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            if not self._uses[address]:
                if address in before:
                    continue  # a view of what was there before the block, or changed in place
                self.live += size
                self.peak = max(self.peak, self.live)
            self._uses[address] += 1
            weakref.finalize(tensor, self._drop, address, size)
        return result

    def _drop(self, address: int, size: int) -> None:
        self._uses[address] -= 1
        if not self._uses[address]:
            self.live -= size


def small_images(config: Any) -> Any:
    """The processor of the preset, for images that a CPU encodes quickly."""
    processor = default_processor(config)
    processor.image_processor.size["longest_edge"] = MAX_IMAGE_TOKENS * 28 * 28
    return processor


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def peak_bytes(run: Callable[[], Any], after: torch.nn.Module | None = None) -> int:
    """Return the peak of a call, or of what it does once a module has run."""
    memory, call = PeakMemory(), GridExecutor.__call__

    def launch(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        memory.is_in_triton = True
        try:
            call(executor, *args, **kwargs)
        finally:
            memory.is_in_triton = False

    def forget(*_: Any) -> None:
        memory.peak = memory.live

    hook = None if after is None else after.register_forward_hook(forget)
    with patch.object(GridExecutor, "__call__", launch), torch.no_grad(), memory:
        run()
    if hook is not None:
        hook.remove()
    return memory.peak


def main(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(peaks_of(kernel_counts.build(*kernel_counts.MODELS[name], Path(folder), small_images))))


def peaks_of(model: torch.nn.Module) -> dict[str, int]:
    config = model.vllm_config
    layers = kernel_counts.cross_attention_layers(model)
    bound = [(cache, cache.kv_cache) for layer in layers for cache in (layer, layer.text_cache) if cache is not None]
    for cache, _ in bound:
        cache.kv_cache = torch.tensor([])
    budget = MultiModalBudget(config, MULTIMODAL_REGISTRY, enable_cache=False)
    hidden_size, dtype = model.config.text_config.hidden_size, torch.float32
    cache = EncoderCache()
    runner = EncoderRunner(model, NUM_TOKENS, hidden_size, cache, dtype, torch.device("cpu"))
    dummies = dummy_images(budget)
    encoder = model.model.visual
    peaks = {"profile_images": peak_bytes(lambda: runner.profile_encoder_cache(dummies, budget), after=encoder)}
    images = list(cache.encoder_outputs.values())

    def attend(metadata: Any) -> None:
        # The operator's body: what runs inside of an operator a dispatch mode does not see.
        layers[0].attend(*layers[0].dummy_operands(NUM_TOKENS, torch.empty(0)), metadata)

    peaks["profile_text"] = peak_bytes(lambda: attend(None))
    for bound_cache, pages in bound:
        bound_cache.kv_cache = pages
    grids = torch.stack([item["image_grid_thw"].data for _, item in dummies])
    nowhere = {layer.layer_name: torch.full((sum(map(len, images)),), -1) for layer in layers}
    peaks["write_images"] = peak_bytes(lambda: model.write_images(torch.cat(images), grids, nowhere))
    metadata = prefill(layers[0])
    peaks["attend_text"] = peak_bytes(lambda: attend(metadata))
    return peaks


def dummy_images(budget: MultiModalBudget) -> list[Any]:
    """What the runner profiles with: the most and largest images of a step."""
    if hasattr(budget, "get_dummy_encoder_profile_inputs"):  # vLLM 0.32
        return budget.get_dummy_encoder_profile_inputs()
    from vllm.multimodal.encoder_budget import get_dummy_encoder_profile_inputs

    return get_dummy_encoder_profile_inputs(MULTIMODAL_REGISTRY, budget)


def prefill(layer: Any) -> Any:
    """Return the metadata of one prompt that follows an image."""
    from dataclasses import replace

    metadata = kernel_counts.decode_metadata(layer.sees_text)
    zero = torch.zeros(1, dtype=torch.int32)
    windows = metadata.windows
    windows = replace(
        windows,
        query_start_loc=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
        first_positions=zero,
        image_block_table=windows.image_block_table[:1],
        image_page_lens=windows.image_page_lens[:1],
        num_image_pages=windows.num_image_pages[:1],
        text_starts=zero,
        text_rows=zero,
        text_block_table=torch.zeros(1, NUM_TOKENS // BLOCK_SIZE, dtype=torch.int32) if layer.sees_text else None,
        text_slot_mapping=torch.full((NUM_TOKENS,), -1) if layer.sees_text else None,
        max_query_len=NUM_TOKENS,
        max_text_len=NUM_TOKENS if layer.sees_text else 0,
        num_tokens=NUM_TOKENS,
    )
    return replace(metadata, windows=windows, relative_positions=torch.arange(NUM_TOKENS) % 64)


if __name__ == "__main__":
    main(*sys.argv[1:])
