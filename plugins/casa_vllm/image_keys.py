"""Keys and values of image tokens, of all CA layers in one go: one batched product and one kernel.

    images (N, C) -> normed for each layer (L, N, C) -> product with the stacked weights (L, N, 2 Hkv D)
                  -> keys normed and rotated, keys and values to the pages of L caches

Layer by layer a frame is hundreds of launches, which on a GPU take longer than their work. The weights are stacked
where the parameters of the layers live: none exists twice.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.utils.torch_utils import async_tensor_h2d

from casa_vllm.cross_attention import CrossAttention
from casa_vllm.stacked_linears import StackedLinears

# For normed and projected image tokens of all layers; more tokens are taken in several goes.
WORKSPACE_BYTES = 256 << 20


class StackedImageKeys:
    """Writes image tokens into the pages of all CA layers.

    Args:
        layers: The model's L CA layers, none of them quantised.
        norms: Norm of image tokens of each layer; None where they are not normed.
        linears: The stacked weights of their keys and values, which are the last rows of each layer's.
    """

    def __init__(
        self, layers: Sequence[CrossAttention], norms: Sequence[RMSNorm] | None, linears: StackedLinears
    ) -> None:
        self.layers, self.norms, self._linears = layers, norms, linears
        self._num_rows = 2 * layers[0].num_kv_heads * layers[0].head_size
        # Of the caches, which are bound when the engine has started.
        self._addresses: list[int] = []
        self._addresses_on_device: torch.Tensor | None = None

    @property
    def is_usable(self) -> bool:
        """Whether the layers still compute with the stacked weights."""
        return self._linears.is_usable

    def write(
        self,
        images: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        slots: Mapping[str, torch.Tensor],
    ) -> None:
        """Compute keys and values and write them into their pages.

        Args:
            images: (N, C) vision output.
            rope: float32 cosines and sines, (N, D) each; None where rotation is the identity.
            slots: For the name of each layer, its (N,) int64 cache slots.

        Mutates:
            The image caches.
        """
        # Triton is not on every CPU.
        from casa_vllm.ops.triton_key_pages import write_image_heads

        caches = [layer.kv_cache for layer in self.layers]
        all_slots = torch.stack([slots[layer.layer_name] for layer in self.layers])
        norms = None if self.norms is None else torch.stack([norm.weight for norm in self.norms])
        head_norms = [layer.projections.k_norm for layer in self.layers]
        head_norms = None if head_norms[0] is None else torch.stack([norm.weight for norm in head_norms])
        step = self._tokens_per_go(images)
        for start in range(0, len(images), step):
            some = slice(start, start + step)
            write_image_heads(
                self._project(images[some], norms),
                caches,
                self._cache_addresses(caches),
                all_slots[:, some],
                None if rope is None else (rope[0][some], rope[1][some]),
                head_norms,
                self.layers[0].projections.norm_eps,
            )

    def profile(self, images: torch.Tensor) -> None:
        """Allocate what one go of `write` does for (N, C) images, before there are caches."""
        norms = None if self.norms is None else torch.stack([norm.weight for norm in self.norms])
        self._project(images[: self._tokens_per_go(images)], norms)

    def _tokens_per_go(self, images: torch.Tensor) -> int:
        per_token = len(self.layers) * (images.shape[1] + self._num_rows) * images.element_size()
        return max(WORKSPACE_BYTES // per_token, 1)

    def _project(self, images: torch.Tensor, norms: torch.Tensor | None) -> torch.Tensor:
        """Return keys and values (L, N, 2 Hkv D) of (N, C); `norms` are the (L, C) weights of norms."""
        if norms is None:
            images = images.expand(len(self.layers), -1, -1)
        else:
            # What the norms of all layers have in common, then the weight of each.
            normed = nn.functional.rms_norm(images, images.shape[-1:], None, self.norms[0].variance_epsilon)
            images = normed * norms[:, None]
        weights = self._linears.weight[:, -self._num_rows :].transpose(1, 2)
        if self._linears.bias is None:
            return torch.bmm(images, weights)
        return torch.baddbmm(self._linears.bias[:, None, -self._num_rows :], images, weights)

    def _cache_addresses(self, caches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return (L,) int64, the address of each cache, on the caches' device."""
        addresses = [cache.data_ptr() for cache in caches]
        if addresses != self._addresses:
            self._addresses = addresses
            self._addresses_on_device = async_tensor_h2d(addresses, caches[0].device, torch.int64)
        return self._addresses_on_device
