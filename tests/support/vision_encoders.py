"""Runs vLLM's vision encoder, eagerly and as its CUDA graphs would be, beside the eager model's. Test support only.

    python vision_encoders.py PRESET IMAGE_NORM

Prints JSON: the largest differences from the eager model's image tokens, and how many images the graphs took. A process
of its own: torchvision, which vLLM's module imports and of which the encoder calls nothing, is an empty module here. A
graph's replay is its forward pass over its buffers; all else of vLLM's manager of graphs is real.
"""

import importlib.machinery
import json
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

from vllm_harness import picture

# Pixels. Tokens of 14 * 2 px a side: from 1 to 64 of them, more than the largest graph takes, and many at once.
SIZES = [(28, 28), (56, 84), (224, 224), (112, 28), (448, 308), (28, 28), (56, 56)]
BUDGETS, MAX_BATCH_SIZE = [16, 64], 4


class Graph:
    """What `torch.cuda.CUDAGraph` is to vLLM's manager."""

    def replay(self) -> None:
        """Run the encoder over the buffers, up to the last patch of the batch: attention on GPUs goes no further."""
        buffers = dict(self.metadata.input_buffers)
        num_patches = int(buffers["cu_seqlens"][-1])
        num_tokens = num_patches // self.model.merge_size**2
        for name in ("pixel_values", "rotary_pos_emb_cos", "rotary_pos_emb_sin"):
            buffers[name] = buffers[name][:num_patches]
        for name in ("window_index", "reverse_indices"):
            buffers[name] = buffers[name][:num_tokens]
        self.metadata.output_buffer[:num_tokens] = self.model.encoder_cudagraph_forward(buffers)


def stub_torchvision() -> None:
    """Let `import torchvision...` succeed."""
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.io"):
        module = ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        module.__getattr__ = empty_class
        sys.modules[name] = module


def empty_class(name: str) -> type:
    """Return what a module of `stub_torchvision` has under a name."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def graph_manager(model: torch.nn.Module, vllm_config: object) -> object:
    """Return vLLM's manager with its graphs captured."""
    from vllm.v1.worker import encoder_cudagraph

    options = vllm_config.compilation_config
    options.encoder_cudagraph_token_budgets = BUDGETS
    options.encoder_cudagraph_max_vision_items_per_batch = MAX_BATCH_SIZE
    manager = encoder_cudagraph.EncoderCudaGraphManager(vllm_config, torch.device("cpu"), torch.float32, model)
    with (
        patch.object(torch.cuda, "CUDAGraph", Graph),
        patch.object(torch.cuda, "graph", lambda *args, **kwargs: nullcontext()),
        patch.object(encoder_cudagraph, "current_stream", lambda: None),
    ):
        manager.capture(graph_pool=object())
    for metadata in manager.budget_graphs["default"].values():
        metadata.graph.model, metadata.graph.metadata = model, metadata
    return manager


@torch.inference_mode()
def main(preset: str, image_norm: bool) -> None:
    from casa_engine.checkpoints import default_processor, random_model, write_checkpoint
    from casa_engine.presets import preset_config

    config = preset_config(preset, fusion="ca", image_norm=image_norm)
    config.architectures = ["CasaForConditionalGeneration"]
    processor, eager = default_processor(config), random_model(config)
    images = [picture(number, *size) for number, size in enumerate(SIZES)]
    floats = processor.process_images(images)
    expected = eager.model.encode_images(floats["pixel_values"], floats["image_grid_thw"])

    stub_torchvision()
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.model_executor.models.interfaces import supports_encoder_cudagraph
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(eager, processor, Path(folder))
        options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
        vllm_config = EngineArgs(model=folder, **options).create_engine_config()
        with set_current_vllm_config(vllm_config):
            init_distributed_environment(1, 0, f"file://{Path(folder)}/rendezvous", 0, "gloo")
            initialize_model_parallel(1, 1)
            with patch.object(torch.accelerator, "empty_cache", lambda: None):  # 0.32 calls it
                model = get_model(vllm_config=vllm_config)
            assert isinstance(model.visual, Qwen2_5_VisionTransformer)
            assert supports_encoder_cudagraph(model)
            pixels, grids = zip(*map(processor.image_bytes, images), strict=True)
            batch = {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.stack(grids)}
            eagerly = torch.cat(list(model.embed_multimodal(**batch)))
            manager = graph_manager(model, vllm_config)
            in_graphs = torch.cat(manager.execute(batch))
    differences = {
        name: (got - expected).abs().max().item() for name, got in (("eager", eagerly), ("graph", in_graphs))
    }
    sizes = {"scale": expected.abs().max().item(), "in_graphs": manager.graph_hits, "beyond": manager.graph_misses}
    print(json.dumps({**differences, **sizes}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "true")
