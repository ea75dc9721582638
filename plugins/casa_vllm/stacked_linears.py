"""Weights of several of vLLM's linear layers in one tensor, so that one product does the work of many."""

from collections.abc import Sequence

import torch
from torch import nn
from vllm import envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

# Formats whose loaders copy into the layers' parameters and then call the model's `process_weights_after_loading`.
# Not among them: `sharded_state` and `runai_streamer_sharded`, which flatten every parameter, also views that are
# columns of a tensor; `tensorizer` and `ipc_cache`, which build the model on the meta device and replace its parameters
# without a call of that hook; loaders of others, of which nothing is known.
STACKABLE_LOAD_FORMATS = frozenset(
    {
        "auto",
        "dummy",
        "fastsafetensors",
        "hf",
        "instanttensor",
        "mistral",
        "npcache",
        "pt",
        "runai_streamer",
        "safetensors",
    }
)


def has_plain_products(vllm_config: VllmConfig) -> bool:
    """Whether vLLM's unquantised linear layers are PyTorch's products on a GPU.

    Not where every batch has to give the same bits, nor where `--linear-backend` names others.
    """
    return vllm_config.kernel_config.linear_backend == "auto" and not envs.VLLM_BATCH_INVARIANT


def can_stack_weights(vllm_config: VllmConfig) -> bool:
    """Whether weights of several layers may be one tensor, with one product: the one place where that is decided.

    Not for a quantised model, whose layers are as in its checkpoint.
    """
    is_plain = vllm_config.quant_config is None and has_plain_products(vllm_config)
    return is_plain and vllm_config.load_config.load_format in STACKABLE_LOAD_FORMATS


class StackedLinears:
    """L groups of linear layers whose parameters are views of one tensor, those of a group joined along `dim`.

        dim 0   one input, the outputs one after another
        dim 1   the inputs one after another, the sum of the outputs; without biases

    Names, loading and shards of the layers stay as they are. To be built before weights are loaded, which are then
    copied into the views.

    Attributes:
        weight: (L, outputs, inputs) on this rank.
        bias: (L, outputs); None where the layers have none.
    """

    def __init__(self, groups: Sequence[Sequence[LinearBase]], dim: int = 0) -> None:
        self._layers = [layer for group in groups for layer in group]
        self.weight = _stack_parameters([[layer.weight for layer in group] for group in groups], dim)
        self.bias = None
        if groups[0][0].bias is not None:
            self.bias = _stack_parameters([[layer.bias for layer in group] for group in groups], dim)
        self._addresses = self._parameter_addresses()

    @property
    def is_usable(self) -> bool:
        """Whether the layers compute with these tensors: after loading their weights may be packed or replaced."""
        return all(map(has_plain_weight, self._layers)) and self._parameter_addresses() == self._addresses

    def _parameter_addresses(self) -> list[int]:
        parameters = [parameter for layer in self._layers for parameter in (layer.weight, layer.bias)]
        return [parameter.data_ptr() for parameter in parameters if parameter is not None]


def has_plain_weight(layer: nn.Module) -> bool:
    """Whether the layer's product is PyTorch's with its `weight`, rows of which may then be used alone.

    Not if it is quantised, packed for a CPU or wrapped by an adapter. `has_plain_products` is asked before.
    """
    is_unquantized = type(getattr(layer, "quant_method", None)) is UnquantizedLinearMethod
    return is_unquantized and layer.weight.numel() > 0


def _stack_parameters(groups: Sequence[Sequence[nn.Parameter]], dim: int) -> torch.Tensor:
    """Move L equal groups of parameters into one tensor (L, ...), of which each parameter becomes a view.

    The old storage is free afterwards; of parameters of 1 to 10 MiB PyTorch may keep it on a GPU as holes between
    others, which only smaller tensors can use.

    Mutates:
        The parameters' `data`.
    """
    first, sizes = groups[0][0].data, [parameter.shape[dim] for parameter in groups[0]]
    shape = list(first.shape)
    shape[dim] = sum(sizes)
    stack = torch.empty((len(groups), *shape), dtype=first.dtype, device=first.device)
    for group, joint in zip(groups, stack, strict=True):
        for parameter, view in zip(group, joint.split(sizes, dim), strict=True):
            view.copy_(parameter.data)
            parameter.data = view
    return stack
