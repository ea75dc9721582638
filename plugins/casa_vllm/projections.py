"""The projections of one attention layer, self-attention's or CA's, made of vLLM's layers."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
)

from casa_engine.configuration import CasaConfig
from casa_vllm.stacked_linears import has_plain_products, has_plain_weight


class AttentionProjections(nn.Module):
    """Query/key/value and output projection, and norms of queries and keys if the backbone has them.

    The output is summed over ranks by the caller, once for both attentions; a bias has to be added before that and
    forbids it.

    Args:
        config: The model's configuration.
        vllm_config: The engine's configuration.
        prefix: Name of the layer.
        has_queries_apart: Whether queries are a product of their own, `q_proj`, beside `kv_proj`; else one `qkv_proj`.

    Attributes:
        num_heads: H on this rank.
        num_kv_heads: Hkv on this rank.
        norm_eps: Of the norms of queries and keys.
    """

    def __init__(
        self, config: CasaConfig, vllm_config: VllmConfig, prefix: str, *, has_queries_apart: bool = False
    ) -> None:
        super().__init__()
        text, size, quant_config = config.text_config, config.head_dim, vllm_config.quant_config
        options = {"bias": config.qkv_bias, "quant_config": quant_config}
        heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.has_queries_apart = has_queries_apart
        if has_queries_apart:
            self.q_proj = ColumnParallelLinear(text.hidden_size, heads * size, prefix=f"{prefix}.q_proj", **options)
            # No query head: keys and values are cut, or repeated, over ranks as those of `qkv_proj` are.
            self.kv_proj = QKVParallelLinear(text.hidden_size, size, 0, kv_heads, prefix=f"{prefix}.kv_proj", **options)
            self.num_heads = self.q_proj.output_size_per_partition // size
            self.num_kv_heads = self.kv_proj.num_kv_heads
        else:
            self.qkv_proj = QKVParallelLinear(
                text.hidden_size, size, heads, kv_heads, prefix=f"{prefix}.qkv_proj", **options
            )
            self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.o_proj = RowParallelLinear(
            heads * size,
            text.hidden_size,
            bias=config.output_bias,
            reduce_results=config.output_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self._has_plain_products = has_plain_products(vllm_config)
        self.norm_eps = text.rms_norm_eps
        self.q_norm = self.k_norm = None
        if config.backbone.has_qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(size, eps=text.rms_norm_eps) for _ in range(2))
        self._sizes = [heads * size for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values, neither normalised nor rotated, as views.

        Args:
            qkv: (T, (H + 2 Hkv) D), output of `qkv_proj`.

        Returns:
            (T, H D), (T, Hkv D) and (T, Hkv D).
        """
        return qkv.split(self._sizes, dim=-1)

    def queries_of(self, projected: torch.Tensor) -> torch.Tensor:
        """Return the (T, H D) queries of what `text_layer` computed."""
        return projected if self.has_queries_apart else self.split(projected)[0]

    def image_keys(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys, normalised but not rotated, and values of image tokens, (N, Hkv D) each, from (N, C)."""
        if self.has_queries_apart:
            key, value = self.kv_proj(images)[0].chunk(2, dim=-1)
        else:
            _, key, value = self.split(self.qkv_proj(images)[0])
        return norm_heads(key, self.k_norm), value

    @property
    def text_layer(self) -> LinearBase:
        """The layer that projects text: queries, and keys and values where they are not apart."""
        return self.q_proj if self.has_queries_apart else self.qkv_proj

    @property
    def key_value_layer(self) -> LinearBase:
        """The layer that makes keys and values: its last 2 Hkv D rows."""
        return self.kv_proj if self.has_queries_apart else self.qkv_proj

    def project_output(self, attended: torch.Tensor, output: torch.Tensor) -> None:
        """Write the projection of (T, H D) to `output`, (T, C); without a copy where that is possible."""
        if self._has_plain_products and self.o_proj.bias is None and has_plain_weight(self.o_proj):
            torch.mm(attended, self.o_proj.weight.t(), out=output)
        else:
            output.copy_(self.o_proj(attended)[0])


def needs_queries_apart(config: CasaConfig, vllm_config: VllmConfig) -> bool:
    """Whether CA layers project queries apart from keys and values.

    The text of `ca` has queries only and its images have keys and values only. Not where queries come from
    self-attention, nor for a quantised model, whose layers are as in its checkpoint.
    """
    is_own = config.is_cross_attention and config.ca_weights == "own"
    return is_own and not config.sees_window_text and vllm_config.quant_config is None


def norm_heads(x: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
    """Return (T, heads * D) with each head normalised, where the backbone has such a norm."""
    return x if norm is None else norm(x.unflatten(-1, (-1, norm.hidden_size))).flatten(-2)
