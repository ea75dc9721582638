"""The vision encoder: vLLM's Qwen2.5-VL encoder, or transformers' where vLLM's cannot be imported.

vLLM's shards over ranks, batches its attention windows in one kernel call and runs as CUDA graphs
(`encoder_graphs.py`): GPUs need it, and `config_hook.py` asks for torchvision there, which its
module imports. There is no CPU build of that beside CPU torch on the package index; transformers'
encoder is the same function under the same parameter names.
"""

from importlib.util import find_spec

import torch
from torch import nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from vllm.model_executor.layers.quantization import QuantizationConfig


class TransformersVisionEncoder(Qwen2_5_VisionTransformerPretrainedModel):
    """transformers' encoder with the interface of vLLM's; every rank computes all of it."""

    def forward(self, pixel_values: torch.Tensor, grid_thw: list[list[int]]) -> torch.Tensor:
        """Encode (P, 1176) patches of I images with grids (t, h, w) to (sum of N, C) image tokens."""
        grids = torch.tensor(grid_thw, device=pixel_values.device)
        return super().forward(pixel_values, grid_thw=grids).pooler_output


def vision_encoder(config: Qwen2_5_VLVisionConfig, quant_config: QuantizationConfig | None, prefix: str) -> nn.Module:
    """Build vLLM's encoder if torchvision is installed, otherwise transformers'."""
    if find_spec("torchvision") is None:
        return TransformersVisionEncoder._from_config(config, dtype=torch.get_default_dtype())
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer

    return Qwen2_5_VisionTransformer(config, quant_config=quant_config, prefix=prefix)
