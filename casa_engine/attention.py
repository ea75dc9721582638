"""Attention under a boolean mask, and the projections that self-attention and CA layers share."""

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from casa_engine.configuration import CasaConfig


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Compute scaled dot-product attention; a query without any key gets exactly zero.

    Args:
        query: (B, H, T, D).
        key: (B, Hkv, S, D), Hkv dividing H.
        value: (B, Hkv, S, D).
        mask: bool (B, T, S), true where the query sees the key.

    Returns:
        (B, T, H * D).
    """
    sees_any = mask.any(dim=-1, keepdim=True)
    output = scaled_dot_product_attention(query, key, value, attn_mask=(mask | ~sees_any)[:, None], enable_gqa=True)
    return (output.transpose(1, 2) * sees_any[..., None]).flatten(2)


class CasaProjections(nn.Module):
    """Query, key, value and output projections of one attention layer (self-attention's or CA's own).

    With a backbone that has q/k norms they are part of both: keys of image tokens are normed as those of text are.
    """

    def __init__(self, config: CasaConfig) -> None:
        super().__init__()
        text, size = config.text_config, config.head_dim
        self.head_dim = size
        self.q_proj = nn.Linear(text.hidden_size, text.num_attention_heads * size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(text.hidden_size, text.num_key_value_heads * size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(text.hidden_size, text.num_key_value_heads * size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(text.num_attention_heads * size, text.hidden_size, bias=config.output_bias)
        self.q_norm, self.k_norm = _head_norm(config), _head_norm(config)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def query(self, x: Tensor) -> Tensor:
        """Project (B, T, C) to queries (B, H, T, D)."""
        return self.q_norm(self._heads(self.q_proj(x)))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project (B, T, C) to keys and values, (B, Hkv, T, D) each."""
        return self.k_norm(self._heads(self.k_proj(x))), self._heads(self.v_proj(x))


def _head_norm(config: CasaConfig) -> nn.Module:
    """Return the norm of each head of queries or keys; the identity where the backbone has none."""
    if not config.backbone.has_qk_norm:
        return nn.Identity()
    return config.backbone.norm_class(config.head_dim, eps=config.text_config.rms_norm_eps)
