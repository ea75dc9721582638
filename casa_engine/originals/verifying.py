"""Compares a converted checkpoint with what the original's own code answered (`scripts/reference_outputs.py`).

That code is run elsewhere; here only the numbers that it wrote are read.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from casa_engine.errors import CheckpointError
from casa_engine.modeling_casa import CasaForConditionalGeneration

CASES = ("text", "random", "image")
# A perplexity below this part of another is clearly lower: what is wrong costs a trained model far more.
CLEARLY = 0.8
# Relative to the largest logit; of bfloat16 the rounding of some thirty layers.
LIMITS = {"float32": 1e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Comparison:
    """One comparison.

    Attributes:
        what: What was compared.
        found: What was found, in words.
        passed: Whether it is as it should be.
    """

    what: str
    found: str
    passed: bool


@torch.inference_mode()
def verify(model: CasaForConditionalGeneration, reference: Path, has_bos: bool) -> Iterator[Comparison]:
    """Yield the comparisons of a model, in float32, with a reference.

    Args:
        model: The eager model.
        reference: The file of `scripts/reference_outputs.py`.
        has_bos: Whether the checkpoint's prompts begin with BOS.

    Raises:
        CheckpointError: The file is none of that script's.
    """
    arrays, about = _read(reference)
    limit = LIMITS[about["dtype"]]
    # Where an insertion model's own code puts the logits of image tokens is not known.
    for case in CASES if model.config.is_cross_attention else CASES[:2]:
        ids, expected = arrays[f"{case}.ids"].tolist(), torch.from_numpy(arrays[f"{case}.logits"])
        images = _images(model, arrays["pixels"], about["point"]) if case == "image" else {}
        logits = _logits(model, ids, images)
        size = min(logits.shape[-1], expected.shape[-1])  # an output layer may be wider than the vocabulary
        error = float((logits[:, :size] - expected[:, :size]).abs().max() / expected.abs().max())
        yield Comparison(f"{case}: logits", f"relative error {error:.2e}, at most {limit:.0e}", error <= limit)
        tokens = list(ids)
        for _ in arrays[f"{case}.greedy"]:
            tokens.append(int(_logits(model, tokens, images)[-1].argmax()))
        greedy, wanted = tokens[len(ids) :], arrays[f"{case}.greedy"].tolist()
        yield Comparison(f"{case}: greedy tokens", f"{greedy}, expected {wanted}", greedy == wanted)
    text, logits = arrays["text"].tolist(), torch.from_numpy(arrays["text.logits"])
    yield from _perplexities(model, text, logits, about["bos"], has_bos)


def _perplexities(
    model: CasaForConditionalGeneration, text: list[int], reference: Tensor, bos: int | None, has_bos: bool
) -> Iterator[Comparison]:
    """How well the backbone predicts English, as it is and otherwise: what is right is lowest by far."""
    plain, expected = _perplexity(_logits(model, text, {}), text), _perplexity(reference, text)

    def row(name: str, value: float, passed: bool) -> Comparison:
        return Comparison(f"perplexity, {name}", f"{value:.2f}; the original without BOS {expected:.2f}", passed)

    yield row("without BOS", plain, abs(plain / expected - 1) < 0.02)
    if bos is not None:
        begun = _perplexity(_logits(model, [bos, *text], {})[1:], text)
        as_loaded, other = (begun, plain) if has_bos else (plain, begun)
        yield row(f"with BOS, which prompts {'have' if has_bos else 'lack'}", begun, other > CLEARLY * as_loaded)
    with _interleaved(model):
        rotated = _perplexity(_logits(model, text, {}), text)
    yield row("pairs of neighbours rotated", rotated, rotated > CLEARLY * plain)


def _perplexity(logits: Tensor, ids: list[int]) -> float:
    losses = torch.nn.functional.cross_entropy(logits[: len(ids) - 1].float(), torch.tensor(ids[1:]))
    return float(losses.exp())


@contextmanager
def _interleaved(model: CasaForConditionalGeneration) -> Iterator[None]:
    """Meanwhile self-attention rotates neighbouring values together, as other Helium models do: by reordered rows."""
    attentions = [layer.self_attn for layer in model.model.language_model.layers if layer.self_attn is not None]
    size = model.config.head_dim
    order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])
    kept = [(name, part, part.data) for one in attentions for name, part in one.named_parameters()]
    try:
        for name, part, data in kept:
            if name.startswith(("q_proj", "k_proj")):
                part.data = data.unflatten(0, (-1, size))[:, order].flatten(0, 1)
        yield
    finally:
        for _, part, data in kept:
            part.data = data


def _logits(model: CasaForConditionalGeneration, ids: list[int], images: dict[str, Tensor]) -> Tensor:
    return model(input_ids=torch.tensor([ids]), **images).logits[0].float()


def _images(model: CasaForConditionalGeneration, pixels: np.ndarray, point: int) -> dict[str, Tensor]:
    """(rows, columns, 588) patches of one frame as ours: (P, 1176), merged ones together, both frames the same."""
    vision = model.config.vision_config
    merge, (rows, columns, _) = vision.spatial_merge_size, pixels.shape
    patches = torch.from_numpy(pixels).reshape(rows // merge, merge, columns // merge, merge, -1)
    patches = patches.transpose(1, 2).reshape(rows * columns, vision.in_channels, 1, -1)
    return {
        "pixel_values": patches.expand(-1, -1, vision.temporal_patch_size, -1).flatten(1),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
        "insertion_points": torch.tensor([[point]]),
    }


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        about = json.loads(str(arrays["about"]))
        names = [f"{case}.{part}" for case in CASES for part in ("ids", "logits", "greedy")] + ["pixels", "text"]
        if lacking := [name for name in names if name not in arrays] or about["dtype"] not in LIMITS:
            raise ValueError(f"it lacks {lacking}")
    except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
        raise CheckpointError(
            f"{path} is no reference: {error}. Write one with scripts/reference_outputs.py, in an environment of its "
            "own: it runs the checkpoint's code."
        ) from error
    return arrays, about
