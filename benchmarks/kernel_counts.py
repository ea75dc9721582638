"""Kernels that CA adds to a decode step, and launches of a frame's keys and values: counted, no GPU is needed.

    python benchmarks/kernel_counts.py [--models 2B-ca 3B-ca_tv] [--json]

The GPU's path runs on a CPU, Triton's kernels under Triton's interpreter, with the layers of the published models and
tiny widths. Counted is what PyTorch dispatches: on a CUDA device each operation that computes is one kernel (a matrix
product may be two, where cuBLAS splits it), a launch of a Triton kernel is one, and a copy from the host is one. Views,
allocations and operations on nothing are none. vLLM's norms are one: they have a kernel there.

A decode step is both attentions of one layer, of two sequences with an image each, as a decode graph runs it: the
matrix products of both, CA's operator and the sum. Self-attention's other kernels (rotation, its cache, the attention)
are left out. A frame is one image of four tokens from the vision encoder's output to all layers' pages.
"""

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Before Triton and vLLM are imported.
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from casa_engine.checkpoints import default_processor
from casa_engine.presets import preset_config

# Preset, layers of the published model, and what differs from the preset.
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "2B-ca": ("tiny-llama", 28, {"fusion": "ca"}),
    "2B-ca-shared": ("tiny-llama", 28, {"fusion": "ca", "ca_weights": "shared"}),
    "2B-ca_tv": ("tiny-llama", 28, {"fusion": "ca_tv"}),
    "3B-ca": ("tiny-qwen", 36, {"fusion": "ca"}),
    "3B-ca_tv": ("tiny-qwen", 36, {"fusion": "ca_tv"}),
    "3B-ca_tv-shared": ("tiny-qwen", 36, {"fusion": "ca_tv", "ca_weights": "shared"}),
    "qwen3-ca": ("tiny-qwen3", 28, {"fusion": "ca"}),
    "qwen3-ca_tv": ("tiny-qwen3", 28, {"fusion": "ca_tv"}),
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
NUM_SEQUENCES, BLOCK_SIZE, GRID = 2, 16, (1, 4, 4)


class LaunchCounter(TorchDispatchMode):
    """Counts what would be launched on a CUDA device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self._is_in_triton = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        tensors = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        computes = not func.is_view and name not in ALLOCATIONS and any(x.numel() for x in tensors)
        if computes and not self._is_in_triton:
            self.launches[name] += 1
        return result

    @contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """Count in a block, Triton's kernels as well."""
        call = GridExecutor.__call__

        def launch(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
            self.launches[executor.fn.__name__.removeprefix("_")] += 1
            self._is_in_triton = True
            try:
                call(executor, *args, **kwargs)
            finally:
                self._is_in_triton = False

        with patch.object(GridExecutor, "__call__", launch), torch.no_grad(), self:
            yield self.launches


def build(
    preset: str,
    num_layers: int,
    fields: dict[str, Any],
    folder: Path,
    processor_of: Callable[[Any], Any] = default_processor,
) -> torch.nn.Module:
    """Return vLLM's model with random weights and caches of a few pages, as it is on a GPU: Triton, plain weights.

    Args:
        preset: Tiny preset.
        num_layers: Layers of the decoder.
        fields: What differs from the preset.
        folder: Where its configuration and processor are written, which vLLM reads.
        processor_of: Makes the processor of a configuration.
    """
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    import casa_vllm.cross_attention
    import casa_vllm.joint_projections
    import casa_vllm.model

    for module in (casa_vllm.cross_attention, casa_vllm.joint_projections, casa_vllm.model):
        module.HAS_TRITON = True
    config = preset_config(preset, **fields)
    config.text_config.num_hidden_layers = num_layers
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = ["full_attention"] * num_layers
    config.architectures = ["CasaForConditionalGeneration"]
    config.save_pretrained(folder)
    processor_of(config).save_pretrained(folder)
    # As on a GPU, where vLLM leaves its layers to torch.compile: inside CA's operator that is their native form.
    options = {"load_format": "dummy", "dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    arguments = EngineArgs(model=str(folder), compilation_config={"custom_ops": ["none"]}, **options)
    vllm_config = arguments.create_engine_config()
    with set_current_vllm_config(vllm_config), torch.no_grad():
        start_distributed(folder)
        model = casa_vllm.model.CasaForConditionalGeneration(vllm_config=vllm_config)
    for module in model.modules():
        module.cpu_linear = torch.nn.functional.linear
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for layer in cross_attention_layers(model):
        for cache in filter(None, (layer, layer.text_cache)):
            shape = (2 * NUM_SEQUENCES + 1, layer.num_kv_heads, BLOCK_SIZE, 2 * layer.head_size)
            cache.kv_cache = torch.zeros(shape)
    return model


def start_distributed(folder: Path) -> None:
    """Start the one rank that vLLM's layers ask for."""
    from vllm.distributed.parallel_state import (
        init_distributed_environment,
        initialize_model_parallel,
        model_parallel_is_initialized,
    )

    if not model_parallel_is_initialized():
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)


def cross_attention_layers(model: torch.nn.Module) -> list[Any]:
    """Return the CA layers in order."""
    from casa_vllm.cross_attention import CrossAttention

    return [module for module in model.modules() if isinstance(module, CrossAttention)]


def decode_metadata(sees_text: bool) -> Any:
    """Return what the layers read in a decode step: each sequence has an image and is at its window's third token."""
    from casa_vllm.attention_metadata import CasaAttentionMetadata
    from casa_vllm.ops import WindowAttentionMetadata

    sequences = torch.arange(NUM_SEQUENCES, dtype=torch.int32)
    ones = torch.ones_like(sequences)
    windows = WindowAttentionMetadata(
        query_start_loc=torch.arange(NUM_SEQUENCES + 1, dtype=torch.int32),
        first_positions=2 * ones,
        image_block_table=1 + sequences[:, None],
        image_page_lens=4 * ones[:, None],
        num_image_pages=ones,
        text_starts=0 * ones,
        text_rows=sequences,
        text_block_table=1 + sequences[:, None] if sees_text else None,
        text_slot_mapping=(1 + sequences.long()) * BLOCK_SIZE + 2 if sees_text else None,
        max_query_len=1,
        max_text_len=3 if sees_text else 0,
        has_image=True,
        num_tokens=NUM_SEQUENCES,
    )
    return CasaAttentionMetadata(windows, torch.full((NUM_SEQUENCES,), 2) if sees_text else None)


@contextmanager
def decoding(model: torch.nn.Module) -> Iterator[Callable[[], torch.Tensor]]:
    """Yield a function that runs both attentions of the first layer; self-attention returns its queries."""
    from casa_vllm.model import SelfAttention

    layer = model.model.language_model.layers[0]
    cross, metadata = layer.cross_attn, decode_metadata(layer.cross_attn.sees_text)
    x, positions = torch.randn(NUM_SEQUENCES, layer.hidden_size), torch.arange(NUM_SEQUENCES)

    def operator(x: torch.Tensor, from_self: torch.Tensor | None, output: torch.Tensor, _: str) -> None:
        cross.attend(x, from_self, output, metadata)

    with (
        # What runs inside of an operator a dispatch mode does not see.
        patch.object(torch.ops.vllm, "casa_cross_attention", operator),
        patch.object(SelfAttention, "attend", lambda own, _, qkv: own.split(qkv)[0]),
    ):
        yield lambda: layer.attend(positions, x)


def count_decode(model: torch.nn.Module) -> Counter[str]:
    """Count both attentions of one layer of a decode step."""
    with decoding(model) as attend:
        return count(attend)


def count_frame(model: torch.nn.Module) -> Counter[str]:
    """Count the keys and values of one image in all layers."""
    slots = BLOCK_SIZE + torch.arange(4)
    slots_of = {layer.layer_name: slots for layer in cross_attention_layers(model)}
    images = torch.randn(4, model.config.text_config.hidden_size)
    return count(lambda: model.write_images(images, torch.tensor([GRID]), slots_of))


def count(run: Callable[[], Any]) -> Counter[str]:
    """Count a second run: the first may fill what is kept."""
    with torch.no_grad():
        run()
    with LaunchCounter().counting() as launches:
        run()
    return launches


def counts_of(name: str) -> dict[str, dict[str, int]]:
    """Return the launches of a model by name: `decode` of a layer, `frame` of all layers."""
    with tempfile.TemporaryDirectory() as folder:
        model = build(*MODELS[name], Path(folder))
    return {"decode": dict(count_decode(model)), "frame": dict(count_frame(model))}


def beside_products(launches: dict[str, int]) -> int:
    """Return how many of the launches are no matrix product."""
    return sum(number for name, number in launches.items() if name not in PRODUCTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", action="store_true", help="all counts, one line")
    options = parser.parse_args()
    counts = {name: counts_of(name) for name in options.models}
    if options.json:
        print(json.dumps(counts))
        return
    print("| model | kernels a layer and decode step | matrix products | launches a frame | kernels of the layer |")
    print("|---|---|---|---|---|")
    for name, launches in counts.items():
        decode, frame = launches["decode"], launches["frame"]
        extra = beside_products(decode)
        kernels = ", ".join(f"{number} {kernel}" for kernel, number in decode.items() if kernel not in PRODUCTS)
        print(f"| {name} | {extra} | {sum(decode.values()) - extra} | {sum(frame.values())} | {kernels} |")


if __name__ == "__main__":
    main()
