"""The eager model (float32) against the paper's equations (float64): relative error under 1e-5."""

import copy

import numpy as np
import pytest
import torch

import equations
from tiny_presets import TINY_PRESETS

IDS = torch.randint(3, 300, (1, 14), generator=torch.Generator().manual_seed(2))
POINTS = {
    "no image": [],
    "image first": [0],
    "image last": [14],
    "text, then an image": [5],
    "adjacent images": [4, 4],
    "one-token window": [6, 7],
    "interleaved": [2, 6, 6, 11],
}
VARIANTS = {
    "parallel own": {},
    "parallel shared": {"ca_weights": "shared"},
    "parallel in a list of layers": {"ca_layers": [0, 2]},
    "replacing": {"ca_placement": "replace", "ca_layers": [1]},
    "images not normed": {"normalize_image_tokens": False},
    "images before their window": {"image_position_offset": -1},
    "frozen image positions": {"image_rope": "frozen"},
}


def relative_error(got: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(got.double().numpy() - expected).max() / np.abs(expected).max())


def run_both(model, ids: torch.Tensor, points: list[int], images) -> float:
    pixels, grids = images
    grids = grids[: len(points)]
    config = model.config
    with torch.no_grad():
        embeds = model.model.encode_images(pixels[: int(grids.prod(-1).sum())], grids) if len(points) else None
        got = model(
            ids,
            image_embeds=embeds,
            image_grid_thw=grids if len(points) else None,
            insertion_points=torch.tensor(points) if len(points) and config.is_cross_attention else None,
        ).logits[0]
    counts = (grids.prod(-1) // 4).tolist()
    tokens = [] if embeds is None else [e.double().numpy() for e in embeds.split(counts)]
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    merged = [(int(h) // 2, int(w) // 2) for _, h, w in grids.tolist()]
    return relative_error(got, equations.logits(ids[0].tolist(), tokens, points, merged, weights, config))


@pytest.mark.parametrize("points", POINTS.values(), ids=POINTS)
@pytest.mark.parametrize("fusion", ["ca", "ca_tv"])
@pytest.mark.parametrize("preset", TINY_PRESETS)
def test_windows(tiny, images, preset: str, fusion: str, points: list[int]) -> None:
    assert run_both(tiny(preset, fusion=fusion), IDS, points, images) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("fusion", ["ca", "ca_tv"])
@pytest.mark.parametrize("preset", TINY_PRESETS)
def test_variants(tiny, images, preset: str, fusion: str, variant: dict) -> None:
    assert run_both(tiny(preset, fusion=fusion, **variant), IDS, [2, 6, 6, 11], images) < 1e-5


@pytest.mark.parametrize("preset", TINY_PRESETS)
def test_norm_of_images(tiny, images, preset: str) -> None:
    """The norm stands behind the encoder, with a weight of its own and the backbone's epsilon."""
    model = tiny(preset, image_norm=True)
    with torch.no_grad():
        plain = model.model.visual(images[0], grid_thw=images[1]).pooler_output.double().numpy()
        normed = model.model.encode_images(*images)
    weight = model.model.image_norm.weight.detach().double().numpy()
    assert np.ptp(weight) > 0.1
    assert relative_error(normed, equations.rms_norm(plain, weight, model.config.text_config.rms_norm_eps)) < 1e-5


@pytest.mark.parametrize("preset", TINY_PRESETS)
@pytest.mark.parametrize("points", POINTS.values(), ids=POINTS)
def test_insertion(tiny, images, preset: str, points: list[int]) -> None:
    model = tiny(preset, fusion="insertion")
    counts = (images[1].prod(-1) // 4).tolist()
    stream = IDS[0].tolist()
    for point, count in reversed(list(zip(points, counts, strict=False))):
        stream[point:point] = [model.config.image_token_id] * count
    assert run_both(model, torch.tensor([stream]), points, images) < 1e-5


def test_ca_is_exactly_zero_without_an_image(tiny) -> None:
    """Before the first image `ca` adds nothing at all: also where the output projection has a bias."""
    model = copy.deepcopy(tiny("tiny-llama", fusion="ca"))
    plain = copy.deepcopy(tiny("tiny-llama", fusion="insertion"))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "cross_attn" not in k})
    bias = torch.nn.Parameter(torch.ones(64))
    for layer in model.model.language_model.layers:
        layer.cross_attn.o_proj.bias = bias
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
