"""Loading a checkpoint into vLLM's model, strictly."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from casa_engine.configuration import CasaConfig
from casa_engine.errors import CheckpointError
from casa_engine.modeling_casa import CasaForConditionalGeneration

STACKED = WeightsMapper(
    orig_to_new_stacked={
        "attn.q_proj.": ("attn.qkv_proj.", "q"),
        "attn.k_proj.": ("attn.qkv_proj.", "k"),
        "attn.v_proj.": ("attn.qkv_proj.", "v"),
        "mlp.gate_proj.": ("mlp.gate_up_proj.", 0),
        "mlp.up_proj.": ("mlp.gate_up_proj.", 1),
    }
)
SHOWN = 5


def load_stacked(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Loads the text model's tensors into its stacked parameters; returns their names."""
    return AutoWeightsLoader(model).load_weights(weights, mapper=STACKED)


def load_strictly(model: nn.Module, config: CasaConfig, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Loads weights that are exactly those of the configuration.

    Args:
        model: vLLM's CASA model. Mutated.
        config: Says, through the eager model, which tensors there must be.
        weights: Name and tensor of each in the checkpoint.

    Returns:
        Names of the loaded parameters.

    Raises:
        CheckpointError: Tensors are missing, unknown or misshapen; the message names them.
    """
    with torch.device("meta"):
        expected = {
            name: tuple(tensor.shape) for name, tensor in CasaForConditionalGeneration(config).state_dict().items()
        }
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    problems: list[str] = []
    seen: set[str] = set()
    checked = _checked(weights, expected, seen, problems)
    loaded = AutoWeightsLoader(model).load_weights(checked)
    problems += [f"missing {name} {expected[name]}" for name in sorted(expected.keys() - seen)]
    if problems:
        shown = "; ".join(problems[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"the checkpoint does not hold the model of its config.json: {shown}{more}. "
            "Check that config and weights belong together."
        )
    return loaded


def _checked(
    weights: Iterable[tuple[str, torch.Tensor]],
    expected: dict[str, tuple[int, ...]],
    seen: set[str],
    problems: list[str],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Passes on the right tensors. Mutates `seen` and `problems`."""
    for name, tensor in weights:
        shape = tuple(tensor.shape)
        seen.add(name)
        if name not in expected:
            problems.append(f"unexpected {name} {shape}")
        elif shape != expected[name]:
            problems.append(f"{name} has shape {shape}, expected {expected[name]}")
        else:
            yield name, tensor
