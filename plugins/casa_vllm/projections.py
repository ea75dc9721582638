"""The projections of one attention layer, self-attention's or CA's, made of vLLM's layers."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from casa_engine.configuration import CasaConfig


class AttentionProjections(nn.Module):
    """Query/key/value and output projection, and norms of queries and keys if the backbone has them.

    The output is summed over ranks by the caller, once for both attentions; a bias has to be added before that and
    forbids it.

    Attributes:
        num_heads: H on this rank.
        num_kv_heads: Hkv on this rank.
    """

    def __init__(self, config: CasaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        text, size, quant_config = config.text_config, config.head_dim, vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            text.hidden_size,
            size,
            text.num_attention_heads,
            text.num_key_value_heads,
            bias=config.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            text.num_attention_heads * size,
            text.hidden_size,
            bias=config.output_bias,
            reduce_results=config.output_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = self.k_norm = None
        if config.backbone.has_qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(size, eps=text.rms_norm_eps) for _ in range(2))
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self._sizes = [heads * size for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns queries and keys, normalised but not rotated, and values.

        Args:
            qkv: (T, (H + 2 Hkv) D), output of `qkv_proj`. The results may be views of it.

        Returns:
            (T, H D), (T, Hkv D) and (T, Hkv D).
        """
        query, key, value = qkv.split(self._sizes, dim=-1)
        return _norm_heads(query, self.q_norm), _norm_heads(key, self.k_norm), value


def _norm_heads(x: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
    """Normalises each head of (T, heads * D)."""
    return x if norm is None else norm(x.unflatten(-1, (-1, norm.hidden_size))).flatten(-2)
