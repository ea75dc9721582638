"""Both attentions of a layer as one: two matrix products where self-attention and CA would have two each.

    x -> [ qkv of self-attention | queries (ca_tv: qkv) of CA ]           rows of both weights in one tensor
    [ attended by self-attention | by CA ] -> their sum, projected        columns of both weights in one tensor

In a decode step a product is little more than the reading of its weights, so that its start and its end count.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import linear
from vllm.config import VllmConfig
from vllm.triton_utils import HAS_TRITON

from casa_engine.configuration import CasaConfig
from casa_vllm.projections import AttentionProjections
from casa_vllm.stacked_linears import StackedLinears, can_stack_weights


def joins_attentions(config: CasaConfig, vllm_config: VllmConfig) -> bool:
    """Whether layers with CA compute both attentions' projections as one: the one place where that is decided.

    Where both have weights of their own and the same input, and Triton's kernels run, which put their results side by
    side, and where weights may be stacked at all. A bias of the output would be added to tokens without an image as
    well. Elsewhere, and where `JointProjections.is_usable` is false after loading, each attention has its products,
    and `ca` skips its own in steps without an image.
    """
    has_both = config.is_cross_attention and bool(config.cross_attention_layers) and config.ca_placement == "parallel"
    has_weights = config.ca_weights == "own" and not config.output_bias
    return HAS_TRITON and has_both and has_weights and can_stack_weights(vllm_config)


def sums_attentions(config: CasaConfig, vllm_config: VllmConfig) -> bool:
    """Whether the sum of what both attended is projected, with shared weights.

    Not with a bias of the output: it belongs to each attention, and to `ca` only where there is an image. Not in a
    quantised model: a checkpoint's scale was measured on what one attention attended, which the sum may exceed.
    """
    return config.ca_weights == "shared" and not config.output_bias and vllm_config.quant_config is None


class JointProjections:
    """The joint weights of all L layers with CA.

    Args:
        layers: Projections of self-attention and of CA of each layer. Their parameters become views.

    Attributes:
        inputs: Weights (L, rows, C) of queries, keys and values; the last rows are CA's.
        outputs: Weights (L, C, 2 H D) of the output.
        layers: What a layer computes with, for each.
    """

    def __init__(self, layers: Sequence[tuple[AttentionProjections, AttentionProjections]]) -> None:
        self.inputs = StackedLinears([(own.qkv_proj, cross.text_layer) for own, cross in layers])
        self.outputs = StackedLinears([(own.o_proj, cross.o_proj) for own, cross in layers], dim=1)
        sizes = [len(layer.weight) for layer in (layers[0][0].qkv_proj, layers[0][1].text_layer)]
        biases = [None] * len(layers) if self.inputs.bias is None else self.inputs.bias
        weights = zip(self.inputs.weight, biases, self.outputs.weight, strict=True)
        self.layers = [LayerProjections(*tensors, sizes) for tensors in weights]

    @property
    def is_usable(self) -> bool:
        """Whether the layers still compute with these weights."""
        return self.inputs.is_usable and self.outputs.is_usable


class LayerProjections:
    """The two products of one layer.

    Args:
        weight: (rows, C) of queries, keys and values.
        bias: (rows,) or None.
        output_weight: (C, 2 H D).
        sizes: Rows of self-attention and of CA.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, output_weight: torch.Tensor, sizes: list[int]
    ) -> None:
        self._weight, self._bias, self._output_weight, self._sizes = weight, bias, output_weight, sizes

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what self-attention and CA make of (T, C): (T, (H + 2 Hkv) D), and as `text_layer` does; views."""
        return linear(x, self._weight, self._bias).split(self._sizes, dim=-1)

    def project_output(self, attended: torch.Tensor) -> torch.Tensor:
        """Return (T, C), not yet summed over ranks, from (T, 2 H D): self-attention's heads, then CA's."""
        return linear(attended, self._output_weight)
