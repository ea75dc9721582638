"""CA layers in vLLM: their caches, and the operator that runs them inside a compiled model.

A CA layer has a page of image keys and values for every page of the image group and, for `ca_tv`,
a second cache of its window-relative text keys that joins vLLM's text groups, so that vLLM's
prefix caching and preemption of text apply to it. The whole layer (projections, rotation, attention) is
one opaque operator, so that a step without an image can skip all of it for `ca`.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.triton_utils import HAS_TRITON
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from casa_engine.configuration import CasaConfig
from casa_engine.rope import rotate
from casa_vllm.attention_metadata import CasaAttentionMetadata, ImageMetadataBuilder, TextMetadataBuilder
from casa_vllm.image_cache_spec import ImageCacheSpec, ImageLimits
from casa_vllm.joint_projections import LayerProjections, sums_attentions
from casa_vllm.ops import WindowAttentionMetadata, window_attention, write_pages
from casa_vllm.projections import AttentionProjections, needs_queries_apart, norm_heads


class CasaCacheBackend(AttentionBackend):
    """Declares the KV caches of CA layers to vLLM; the attention itself is in `CrossAttention`."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012 (vLLM's)
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """Return the name in vLLM's log."""
        return "CASA"

    @staticmethod
    def get_impl_cls() -> type:
        """Unused: CA layers are no `Attention` of vLLM's."""
        raise NotImplementedError("CA layers run through casa_vllm.cross_attention, not an impl.")


class ImageCacheBackend(CasaCacheBackend):
    """Of image caches."""

    @staticmethod
    def get_builder_cls() -> type[ImageMetadataBuilder]:
        """Return the builder of the group's metadata."""
        return ImageMetadataBuilder


class TextCacheBackend(CasaCacheBackend):
    """Of the text caches of `ca_tv`."""

    @staticmethod
    def get_builder_cls() -> type[TextMetadataBuilder]:
        """Return the builder of the group's metadata."""
        return TextMetadataBuilder


class CacheLayer(nn.Module, AttentionLayerBase):
    """A KV cache that vLLM allocates and binds, (blocks, Hkv, block size, 2 D); `backend` declares it.

    Args:
        vllm_config: The engine's configuration; the layer registers itself there.
        layer_name: Its name in vLLM's forward context and KV-cache groups.
        num_kv_heads: Hkv on this rank.
        head_size: D.
    """

    backend: type[AttentionBackend]

    def __init__(self, vllm_config: VllmConfig, layer_name: str, num_kv_heads: int, head_size: int) -> None:
        super().__init__()
        self.layer_name = layer_name
        self.num_kv_heads, self.head_size = num_kv_heads, head_size
        self.kv_cache = torch.tensor([])
        layers = vllm_config.compilation_config.static_forward_context
        if layer_name in layers:
            raise ValueError(f"two layers are named {layer_name!r}; expected different prefixes.")
        layers[layer_name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Return the backend, whose builder makes the metadata of the layer's group."""
        return self.backend

    def _spec_fields(self, vllm_config: VllmConfig) -> dict[str, Any]:
        return {
            "block_size": vllm_config.cache_config.block_size,
            "num_kv_heads": self.num_kv_heads,
            "head_size": self.head_size,
            "dtype": vllm_config.model_config.dtype,
        }


class TextCache(CacheLayer):
    """Text keys of `ca_tv`, rotated relative to their window's start, and values."""

    backend = TextCacheBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Return the same spec as self-attention's, so that it joins the text groups."""
        return FullAttentionSpec(**self._spec_fields(vllm_config))


class CrossAttention(CacheLayer):
    """One CA layer, which is also its own image cache.

    Args:
        config: The model's configuration.
        vllm_config: The engine's configuration.
        shared: Self-attention's projections with shared weights, else None.
        limits: Limits on the images of a request.
        rotary_emb: The backbone's rotary embedding for text.
        inv_freq: float32 (D / 2,), the same for image keys.
        prefix: Name of the layer.

    Attributes:
        joint: Products that self-attention and CA have in common, else None (see joint_projections.py).
        shares_output: Whether the sum of what both attended is projected (see `sums_attentions`).
    """

    backend = ImageCacheBackend
    joint: LayerProjections | None = None

    def __init__(
        self,
        config: CasaConfig,
        vllm_config: VllmConfig,
        shared: AttentionProjections | None,
        limits: ImageLimits,
        rotary_emb: nn.Module,
        inv_freq: torch.Tensor,
        prefix: str,
    ) -> None:
        projections = shared or AttentionProjections(
            config, vllm_config, prefix, has_queries_apart=needs_queries_apart(config, vllm_config)
        )
        super().__init__(vllm_config, prefix, projections.num_kv_heads, config.head_dim)
        self.config, self.limits = config, limits
        self.scale = config.head_dim**-0.5
        self.sees_text, self.is_shared = config.sees_window_text, shared is not None
        self.shares_output = self.is_shared and sums_attentions(config, vllm_config)
        if shared is None:
            for name, module in projections.named_children():  # the checkpoint has no level between
                self.add_module(name, module)
        # A tuple, so that nothing in it is registered (and loaded) a second time.
        self._projections = (projections, rotary_emb)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.text_cache = None
        if self.sees_text:
            self.text_cache = TextCache(vllm_config, f"{prefix}.text", self.num_kv_heads, config.head_dim)

    @property
    def projections(self) -> AttentionProjections:
        """The layer's own, or self-attention's."""
        return self._projections[0]

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Return the spec of image pages, which are in a group of their own."""
        return ImageCacheSpec(**self._spec_fields(vllm_config), **asdict(self.limits))

    def forward(self, x: torch.Tensor, hidden_size: int) -> torch.Tensor:
        """Compute CA's contribution to the residual stream, not yet summed over ranks.

        Args:
            x: (T, C) normed hidden states, or with shared weights their (T, (H + 2 Hkv) D)
                projections, neither normed nor rotated.
            hidden_size: C.

        Returns:
            (T, C).
        """
        output = x.new_empty(x.shape[0], hidden_size)
        torch.ops.vllm.casa_cross_attention(x, None, output, self.layer_name)
        return output

    def attend_heads(self, projected: torch.Tensor, from_self: torch.Tensor | None = None) -> torch.Tensor:
        """Compute what CA attended, for a layer that projects the output of both attentions as one.

        Args:
            projected: What `text_layer` of the projections makes of (T, C), neither normed nor rotated.
            from_self: (T, H D), attended by self-attention, with joint projections.

        Returns:
            (T, H D), or `from_self` and then those, (T, 2 H D).
        """
        width = self.projections.num_heads * self.head_size
        output = projected.new_empty(projected.shape[0], width if from_self is None else 2 * width)
        torch.ops.vllm.casa_cross_attention(projected, from_self, output, self.layer_name)
        return output

    @property
    def projects_output(self) -> bool:
        """Whether the operator is that of `forward`, and not of `attend_heads`."""
        return self.joint is None and not self.shares_output

    def dummy_operands(
        self, num_tokens: int, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return `x`, `from_self` and `output` of `attend` for T tokens: zeros of the type and device of `like`."""
        projections, hidden_size = self.projections, self.config.text_config.hidden_size
        width = heads = projections.num_heads * self.head_size
        if not projections.has_queries_apart:
            width += 2 * self.num_kv_heads * self.head_size
        if self.joint is not None:
            return tuple(like.new_zeros(num_tokens, size) for size in (width, heads, 2 * heads))
        x = like.new_zeros(num_tokens, width if self.is_shared else hidden_size)
        return x, None, like.new_zeros(num_tokens, heads if self.shares_output else hidden_size)

    def step_metadata(self, metadata: dict[str, Any] | None) -> CasaAttentionMetadata | None:
        """Return what the layer reads of the forward context's metadata; None where it adds nothing."""
        step = metadata.get(self.layer_name) if metadata else None
        if step is None or self.text_cache is None:
            return step
        return step.with_text(metadata[self.text_cache.layer_name])

    def attend(
        self,
        x: torch.Tensor,
        from_self: torch.Tensor | None,
        output: torch.Tensor,
        metadata: CasaAttentionMetadata | None,
    ) -> None:
        """Run the operator of `forward` or of `attend_heads`. Mutates `output` and the text cache."""
        if self.is_unbound:
            self._profile(x, output)
            return
        if metadata is None or not (self.sees_text or metadata.windows.has_image):
            width = 0 if from_self is None else from_self.shape[1]
            output[:, width:].zero_()
            if from_self is not None:
                output[:, :width] = from_self
            return
        windows = metadata.windows
        query = self._text(x, metadata) if self.sees_text else self._queries(x)
        if not self.projects_output:
            beside = None if from_self is None else self._heads(from_self)
            self._attend_windows(query, windows, self._heads(output), beside)
            return
        attended = torch.empty_like(query, memory_format=torch.contiguous_format)
        self._attend_windows(query, windows, attended)
        self.projections.project_output(attended.flatten(1), output)
        if self.config.output_bias and not self.sees_text:
            # Without an image CA contributes exactly zero, not the projection's bias.
            output *= windows.tokens_with_image(len(output))[:, None]

    def _attend_windows(
        self,
        query: torch.Tensor,
        windows: WindowAttentionMetadata,
        output: torch.Tensor,
        beside: torch.Tensor | None = None,
    ) -> None:
        text_cache = self.text_cache.kv_cache if self.sees_text else None
        window_attention(query, self.kv_cache, text_cache, windows, self.scale, output, beside, use_triton=HAS_TRITON)

    @property
    def is_unbound(self) -> bool:
        """Whether vLLM has not allocated the caches yet: it measures what a step needs beside them."""
        return self.kv_cache.numel() == 0

    def _profile(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Allocate what the layer does in a step, without keys to attend. Mutates `output`: zeros."""
        if self.sees_text:
            query = self.projections.split(self._projected(x))[0]
            query = torch.empty_like(query, memory_format=torch.contiguous_format)
        else:
            query = self._queries(x).flatten(1)
        if self.projects_output:
            self.projections.project_output(torch.zeros_like(query, memory_format=torch.contiguous_format), output)
        output.zero_()

    def _projected(self, x: torch.Tensor) -> torch.Tensor:
        """Return queries, and what else the layer's `text_layer` makes, of the operator's input."""
        is_projected = self.is_shared or self.joint is not None
        return x if is_projected else self.projections.text_layer(x)[0]

    def _queries(self, x: torch.Tensor) -> torch.Tensor:
        """Return the (T, H, D) queries of `ca`, which are not rotated."""
        projections = self.projections
        query = projections.queries_of(self._projected(x))
        if HAS_TRITON and projections.q_norm is not None:
            from casa_vllm.ops.triton_key_pages import normalize_heads

            return normalize_heads(self._heads(query), projections.q_norm.weight, projections.norm_eps)
        return self._heads(norm_heads(query, projections.q_norm))

    def _text(self, x: torch.Tensor, metadata: CasaAttentionMetadata) -> torch.Tensor:
        """Return the rotated (T, H, D) queries of `ca_tv`. Mutates the text cache, into which keys and values go."""
        projections, rotary_emb = self._projections
        qkv = projections.split(self._projected(x))
        cache, slots = self.text_cache.kv_cache, metadata.windows.text_slot_mapping
        if HAS_TRITON:
            from casa_vllm.ops.triton_key_pages import prepare_text_heads

            q_norm, k_norm = projections.q_norm, projections.k_norm
            return prepare_text_heads(
                *(self._heads(part) for part in qkv),
                cache,
                slots,
                metadata.relative_positions,
                rotary_emb.cos_sin_cache,
                None if q_norm is None else (q_norm.weight, k_norm.weight),
                projections.norm_eps,
            )
        query, key, value = qkv
        query, key = norm_heads(query, projections.q_norm), norm_heads(key, projections.k_norm)
        if self.is_shared:
            # Copies: self-attention rotates the same projections in place by other positions.
            query, key = query.clone(), key.clone()
        query, key = rotary_emb(metadata.relative_positions[: len(x)], query, key)
        write_pages(self._heads(key), self._heads(value), cache, slots, use_triton=False)
        return self._heads(query)

    def write_images(
        self,
        images: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        slots: torch.Tensor,
    ) -> None:
        """Compute keys and values of image tokens and write them into their pages.

        Args:
            images: (N, C) vision output, normed if the configuration asks for it.
            rope: cos, sin (N, D) of the image tokens; None for `ca`.
            slots: (N,) int64 cache slots.

        Mutates:
            The image cache.
        """
        projections, _ = self._projections
        key, value = (self._heads(entry) for entry in projections.image_keys(images))
        if rope is not None:
            key = rotate(key, rope[0][:, None], rope[1][:, None])
        write_pages(key, value, self.kv_cache, slots, use_triton=HAS_TRITON)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_size))


def _casa_cross_attention(
    x: torch.Tensor, from_self: torch.Tensor | None, output: torch.Tensor, layer_name: str
) -> None:
    context = get_forward_context()
    layer = context.no_compile_layers[layer_name]
    layer.attend(x, from_self, output, layer.step_metadata(context.attn_metadata))


def _casa_cross_attention_fake(
    x: torch.Tensor, from_self: torch.Tensor | None, output: torch.Tensor, layer_name: str
) -> None:
    return


direct_register_custom_op(
    op_name="casa_cross_attention",
    op_func=_casa_cross_attention,
    mutates_args=["output"],
    fake_impl=_casa_cross_attention_fake,
)
