"""Training-time variety: slightly turned, sheared, thinned digits, and camera-like noise.

The digits keep their cell and their size in px; only what is drawn inside that
square varies. All augmented glyphs are made at once (`GlyphBank`), because
rendering one by one would cost more than the training step.
"""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from casa_digits.data import CELL_PX, DIGIT_SIZES_PX, MIN_LUMINANCE_DIFFERENCE, DigitSamples, luminance

MODES = ("bilinear", "bicubic", "nearest")
MODE_SHARES = (0.45, 0.45, 0.10)


@dataclass(frozen=True)
class GlyphBank:
    """Ready-made glyphs.

    Attributes:
        ink: (G, 28, 28) uint8; glyph g fills its top-left sizes[g] x sizes[g] px.
        sizes: (G,) edge in px.
        labels: (G,) the digit.
        of_label: for each digit, the glyphs that show it.
    """

    ink: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    of_label: tuple[np.ndarray, ...]


def _affine(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw (count, 2, 3) maps from output to input coordinates in -1..1; about a third are the identity."""
    angle = rng.normal(0.0, 0.12, count)
    shear = rng.normal(0.0, 0.10, count)
    scale_x, scale_y = rng.uniform(0.92, 1.15, (2, count))
    shift = rng.uniform(-0.08, 0.08, (2, count))
    cos, sin = np.cos(angle), np.sin(angle)
    matrices = np.stack(
        [
            np.stack([cos * scale_x, -sin * scale_y + shear, shift[0]], -1),
            np.stack([sin * scale_x, cos * scale_y, shift[1]], -1),
        ],
        axis=1,
    )
    matrices[rng.random(count) < 0.3] = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    return matrices.astype(np.float32)


def make_bank(rng: np.random.Generator, samples: DigitSamples, variants: int) -> GlyphBank:
    """Draw `variants` augmented glyphs of every sample, each with its own size and filter."""
    count = len(samples) * variants
    source = np.tile(np.arange(len(samples)), variants)
    sizes = rng.choice(DIGIT_SIZES_PX, count)
    modes = rng.choice(len(MODES), count, p=MODE_SHARES)
    matrices = torch.from_numpy(_affine(rng, count))
    gamma = np.exp(rng.normal(0.0, 0.25, count)).astype(np.float32)[:, None, None]
    strength = rng.uniform(0.85, 1.0, count).astype(np.float32)[:, None, None]
    images = torch.from_numpy(samples.images)[:, None]
    ink = np.zeros((count, CELL_PX, CELL_PX), np.uint8)
    for size in DIGIT_SIZES_PX:
        for mode, name in enumerate(MODES):
            chosen = np.flatnonzero((sizes == size) & (modes == mode))
            if not len(chosen):
                continue
            where = functional.affine_grid(
                matrices[chosen], [len(chosen), 1, int(size), int(size)], align_corners=False
            )
            glyphs = functional.grid_sample(
                images[source[chosen]], where, mode=name, padding_mode="zeros", align_corners=False
            )
            glyphs = glyphs[:, 0].clamp(0.0, 1.0).numpy() ** gamma[chosen] * strength[chosen]
            ink[chosen, :size, :size] = (glyphs * 255.0 + 0.5).astype(np.uint8)
    labels = samples.labels[source]
    return GlyphBank(ink, sizes, labels, tuple(np.flatnonzero(labels == digit) for digit in range(10)))


def linear_luminance(colour: np.ndarray) -> np.ndarray:
    """Compute relative luminance of the web's contrast rules: Rec. 709 weights on linear light; (..., 3) -> (...)."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def draw_training_colours(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw colours of ink and paper, (count, 3) each in 0..1.

    Luminance is mostly that of `data.luminance`, for a fifth that of the web's contrast rules (the two differ in light
    greys); a tenth is black and white.
    """
    pairs = rng.integers(0, 256, (12 * count, 2, 3)) / 255.0
    measure = np.where(rng.random(len(pairs)) < 0.2, linear_luminance(pairs).T, luminance(pairs).T)
    pairs = pairs[np.abs(measure[0] - measure[1]) >= MIN_LUMINANCE_DIFFERENCE]
    pairs = np.resize(pairs, (count, 2, 3)).astype(np.float32)
    plain = rng.random(count) < 0.1
    black_first = rng.integers(0, 2, count)[:, None]
    ink = np.where(plain[:, None], black_first, pairs[:, 0])
    paper = np.where(plain[:, None], 1 - black_first, pairs[:, 1])
    return ink, paper


def camera_noise(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Degrade (H, W, 3) uint8 as a codec or a sensor does: JPEG blocks, grain, a change of brightness."""
    kind = rng.random()
    if kind < 0.5:
        buffer = BytesIO()
        Image.fromarray(pixels).save(
            buffer, "JPEG", quality=int(rng.integers(40, 96)), subsampling=int(rng.integers(0, 3))
        )
        return np.asarray(Image.open(buffer).convert("RGB"))
    grain = rng.standard_normal(pixels.shape, np.float32) * rng.uniform(1.0, 8.0) + rng.uniform(-8.0, 8.0)
    return np.clip(pixels + grain, 0, 255).astype(np.uint8)
