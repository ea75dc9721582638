"""Compares an export with the eager model: each graph on its own inputs, then greedy answers.

The error of a result is its largest difference from the fp32 eager model, relative to the largest reference value.
Limits: 1e-4 for fp32 graphs; for fp16 twice the error that the eager model itself has in fp16.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from casa_engine.checkpoints import load_model
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.rope import image_token_counts
from casa_export.errors import ExportError
from casa_export.exported_model import ExportedModel
from casa_export.exporter import DTYPES, ExportPlan
from casa_export.graph_spec import cache_layers

FP32_LIMIT = 1e-4
NAIVE_FACTOR = 2.0
NUM_GREEDY_TOKENS = 64
PROMPT_TOKENS = 24
# Grids in patches: one window, several uneven windows, one token high.
GRIDS = ((1, 4, 4), (1, 10, 14), (1, 2, 12), (1, 8, 8))
# Images of the prompt of prefill and decode, of which the last ones share a window, and the tokens decoded after it.
PROMPT_GRIDS, NUM_ADJACENT = (GRIDS[0], GRIDS[2], GRIDS[0]), 2
DECODED_TOKENS = (5, 6, 7, 8)


@dataclass(frozen=True)
class Comparison:
    """One line of the validation table.

    Attributes:
        what: The graph and the case.
        error: Relative error, or the number of prompts that differ.
        limit: Largest that passes.
    """

    what: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit (never for NaN)."""
        return self.error <= self.limit


def check_limits(plan: ExportPlan, num_prompts: int) -> None:
    """Raise ExportError if `validate` could not run on an export with these limits."""
    if num_prompts < 0:
        raise ExportError(f"number of prompts to validate with is {num_prompts}; expected a whole number from 0.")
    tokens = image_token_counts(torch.tensor(PROMPT_GRIDS), plan.config.vision_config.spatial_merge_size)
    answer = NUM_GREEDY_TOKENS if plan.dtype == "fp32" and num_prompts else len(DECODED_TOKENS)
    needed = {
        "text_tokens": PROMPT_TOKENS + answer,
        "image_tokens": max(tokens),
        "call_image_tokens": sum(tokens[-NUM_ADJACENT:]),
    }
    for name, least in needed.items():
        if getattr(plan.limits, name) < least:
            raise ExportError(
                f"limit {name} is {getattr(plan.limits, name)}; the validation needs {least}. Raise it, or add "
                "--no-validate."
            )


def format_table(comparisons: list[Comparison]) -> str:
    """Return the comparisons as text, one line each."""
    lines = [f"{'comparison':<44} {'error':>10} {'limit':>10}"]
    lines += [f"{c.what:<44} {c.error:>10.3g} {c.limit:>10.3g}  {'ok' if c.passed else 'FAILED'}" for c in comparisons]
    return "\n".join(lines)


def validate(source: str | Path, folder: str | Path, num_prompts: int = 20, seed: int = 0) -> list[Comparison]:
    """Compare an exported folder with its checkpoint.

    Args:
        source: The checkpoint.
        folder: The export.
        num_prompts: Multi-image prompts whose greedy tokens are compared (fp32 only; low precision has near-ties).
        seed: Of the random inputs.

    Returns:
        All comparisons.

    Raises:
        ExportError: The dtype cannot run on this machine's CPU.
    """
    exported = ExportedModel.load(folder)
    dtype = exported.manifest.model["dtype"]
    eager = load_model(source)
    naive = None if dtype == "fp32" else load_model(source, DTYPES[dtype])
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        lines = _compare_graphs(eager, naive, exported, generator)
        if naive is None and num_prompts:
            prompts = [multi_image_prompt(exported, generator) for _ in range(num_prompts)]
            wrong = sum(generate_greedily(eager, *prompt) != generate_greedily(exported, *prompt) for prompt in prompts)
            lines.append(Comparison(f"{NUM_GREEDY_TOKENS} greedy tokens, {num_prompts} prompts, differing", wrong, 0))
    return lines


def check(comparisons: list[Comparison]) -> None:
    """Raise ExportError if a comparison failed."""
    failed = [comparison.what for comparison in comparisons if not comparison.passed]
    if failed:
        raise ExportError(f"the graphs differ from the eager model in: {', '.join(failed)}. Do not use this export.")


def multi_image_prompt(exported: ExportedModel, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a random prompt with two to four random images, at random places.

    Returns:
        input_ids int64 (1, T), and the images' `pixel_values`, `image_grid_thw`, `insertion_points`.
    """
    num_images = int(torch.randint(2, 5, (), generator=generator))
    fitting = [grid for grid in GRIDS if _tokens(exported, grid) <= exported.limits.image_tokens] or [(1, 2, 2)]
    grids = torch.tensor(
        [fitting[int(torch.randint(len(fitting), (), generator=generator))] for _ in range(num_images)]
    )
    ids = torch.randint(2, exported.config.text_config.vocab_size, (1, PROMPT_TOKENS), generator=generator)
    # Different places: several images in one window may be more than the export's limits allow.
    points = torch.randperm(PROMPT_TOKENS + 1, generator=generator)[None, :num_images].sort().values
    return ids, _images(exported, grids, generator) | {"insertion_points": points}


def generate_greedily(model, ids: Tensor, images: dict[str, Tensor], num_tokens: int = NUM_GREEDY_TOKENS) -> list[int]:
    """Return the greedy tokens of a prompt, continuing past stop tokens."""
    cache, new = model.new_cache(), []
    output = model(ids, past_key_values=cache, logits_to_keep=1, **images)
    for _ in range(num_tokens):
        token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        new.append(int(token))
        output = model(token, past_key_values=cache, logits_to_keep=1)
    return new


def _tokens(exported: ExportedModel, grid: tuple[int, ...]) -> int:
    return image_token_counts(torch.tensor([grid]), exported.config.vision_config.spatial_merge_size)[0]


def _images(exported: ExportedModel, grids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    patch = exported.manifest.graphs["vision"].inputs[0].axes[1]
    pixels = torch.randn(int(grids.prod(dim=-1).sum()), patch, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grids}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return the largest difference, relative to the largest absolute reference value."""
    return float((value.float() - reference).abs().max() / reference.abs().max())


def _compare_graphs(
    eager: CasaForConditionalGeneration,
    naive: CasaForConditionalGeneration | None,
    exported: ExportedModel,
    generator: torch.Generator,
) -> list[Comparison]:
    cases = [(f"vision, grid {grid[1]}x{grid[2]}", _vision, [grid]) for grid in GRIDS]
    cases = [case for case in cases if _tokens(exported, case[2][0]) <= exported.limits.image_tokens]
    cases += [("image KV", _image_kv, []), ("decoder prefill, 3 images", _prefill, [])]
    lines = []
    state = generator.get_state()
    for what, compute, arguments in cases:
        lines.append(_compare(what, compute, arguments, eager, naive, exported, generator.set_state(state)))
    return [*lines, _compare("decoder decode", _decode, [], eager, naive, exported, generator.set_state(state))]


def _compare(what, compute, arguments, eager, naive, exported, generator) -> Comparison:
    state = generator.get_state()
    results = []
    for model in (eager, exported, naive):
        if model is not None:
            results.append(compute(model, exported, generator.set_state(state), *arguments))
    reference, value, *rest = results
    limit = NAIVE_FACTOR * relative_error(rest[0], reference) if rest else FP32_LIMIT
    return Comparison(what, relative_error(value, reference), limit)


def _vision(model, exported: ExportedModel, generator: torch.Generator, grid: tuple[int, ...]) -> Tensor:
    images = _images(exported, torch.tensor([grid]), generator)
    if model is exported:
        return torch.from_numpy(exported.encode_image(images["pixel_values"].numpy(), np.array(grid)))
    return model.model.encode_images(**images)


def _image_kv(model, exported: ExportedModel, generator: torch.Generator) -> Tensor:
    """Return the keys and values of all layers in the cache after a prompt of one image."""
    grids = torch.tensor([GRIDS[0]])
    images = _images(exported, grids, generator) | {"insertion_points": torch.tensor([[0]])}
    cache = model.new_cache()
    model(torch.full((1, 2), 5), past_key_values=cache, **images)
    layers = cache_layers(exported.config, "image")
    if model is exported:
        names = [f"image_{part}.{layer}" for part in ("key", "value") for layer in layers]
        return torch.stack([torch.from_numpy(cache.image_kv[name].numpy()) for name in names])
    return torch.stack([kept[layer] for kept in (cache.window_keys, cache.window_values) for layer in layers])


def _prefill(model, exported: ExportedModel, generator: torch.Generator) -> Tensor:
    return _run(model, exported, generator, model.new_cache()).logits


def _decode(model, exported: ExportedModel, generator: torch.Generator) -> Tensor:
    """Return the logits of four steps after the prompt, on fixed tokens."""
    cache = model.new_cache()
    _run(model, exported, generator, cache)
    steps = [model(torch.tensor([[token]]), past_key_values=cache).logits for token in DECODED_TOKENS]
    return torch.cat(steps, dim=1)


def _run(model, exported: ExportedModel, generator: torch.Generator, cache):
    grids = torch.tensor(PROMPT_GRIDS)
    ids = torch.randint(2, exported.config.text_config.vocab_size, (1, PROMPT_TOKENS), generator=generator)
    points = torch.tensor([[2] + [11] * NUM_ADJACENT])
    images = _images(exported, grids, generator) | {"insertion_points": points}
    return model(ids, past_key_values=cache, **images)
