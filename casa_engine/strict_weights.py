"""The strict rule for weights: a checkpoint holds exactly the tensors of its configuration's model."""

from collections.abc import Mapping

import torch

from casa_engine.configuration import CasaConfig
from casa_engine.errors import CheckpointError
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.weight_files import Shapes

SHOWN = 5


def model_shapes(config: CasaConfig) -> Shapes:
    """Return name and shape of each tensor that a checkpoint of this configuration holds; allocate nothing."""
    with torch.device("meta"):
        model = CasaForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def check_shapes(checkpoint: str, expected: Shapes, found: Mapping[str, tuple[int, ...]]) -> None:
    """Check tensors against those of the model.

    Args:
        checkpoint: What the message calls it.
        expected: What `model_shapes` returned.
        found: The same of what the checkpoint holds.

    Raises:
        CheckpointError: Tensors are missing, extra or of another shape; the message names them.
    """
    problems = [f"missing {name} {expected[name]}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {name} {found[name]}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {found[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"{checkpoint} does not hold the model of its config.json: {'; '.join(problems[:SHOWN])}{more}. "
            "Check that config and weights belong together."
        )
