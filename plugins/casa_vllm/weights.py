"""Loading a checkpoint into vLLM's model, strictly."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from casa_engine.configuration import CasaConfig
from casa_engine.strict_weights import check_shapes, model_shapes
from casa_engine.weight_files import Shapes

Stacked = dict[str, tuple[str, str | int]]

MLP: Stacked = {
    "mlp.gate_proj.": ("mlp.gate_up_proj.", 0),
    "mlp.up_proj.": ("mlp.gate_up_proj.", 1),
}
ATTENTION: Stacked = {
    "attn.q_proj.": ("attn.qkv_proj.", "q"),
    "attn.k_proj.": ("attn.qkv_proj.", "k"),
    "attn.v_proj.": ("attn.qkv_proj.", "v"),
}
# The same where CA layers project queries apart (see projections.py).
ATTENTION_QUERIES_APART: Stacked = {
    "self_attn.q_proj.": ("self_attn.qkv_proj.", "q"),
    "self_attn.k_proj.": ("self_attn.qkv_proj.", "k"),
    "self_attn.v_proj.": ("self_attn.qkv_proj.", "v"),
    "cross_attn.k_proj.": ("cross_attn.kv_proj.", "k"),
    "cross_attn.v_proj.": ("cross_attn.kv_proj.", "v"),
}


def load_stacked(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], *, has_queries_apart: bool) -> set[str]:
    """Load the text model's tensors into its stacked parameters.

    Args:
        model: The text model. Mutated.
        weights: Name and tensor of each in the checkpoint.
        has_queries_apart: Whether CA layers project queries apart from keys and values.

    Returns:
        Names of the loaded parameters.
    """
    stacked = MLP | (ATTENTION_QUERIES_APART if has_queries_apart else ATTENTION)
    return AutoWeightsLoader(model).load_weights(weights, mapper=WeightsMapper(orig_to_new_stacked=stacked))


def load_strictly(model: nn.Module, config: CasaConfig, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Load weights that are exactly those of the configuration.

    Args:
        model: vLLM's CASA model. Mutated.
        config: Determines, through the eager model, the expected tensors.
        weights: Name and tensor of each in the checkpoint.

    Returns:
        Names of the loaded parameters.

    Raises:
        CheckpointError: Tensors are missing, unknown or misshapen; the message names them.
    """
    expected = model_shapes(config)
    found: Shapes = {}
    loaded = AutoWeightsLoader(model).load_weights(_matching(weights, expected, found))
    check_shapes("the checkpoint", expected, found)
    return loaded


def _matching(
    weights: Iterable[tuple[str, torch.Tensor]], expected: Shapes, found: Shapes
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the expected tensors, and record all of them. Mutates `found`."""
    for name, tensor in weights:
        found[name] = tuple(tensor.shape)
        if found[name] == expected.get(name):
            yield name, tensor
