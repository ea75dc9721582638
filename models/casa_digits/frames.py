"""A pool of encoded training images: with a frozen tower, each image is drawn and encoded once and used many times.

Images come in families of scenes of one grid, later scenes being edits of the first, and each scene in two takes (one
clean, one noisy), so that a stream can stay on a scene, re-take it, or change a little.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from casa_digits.augment import GlyphBank
from casa_digits.batches import EMPTY, add_noise, draw_scenes, edit_scenes
from casa_digits.data import Grid, draw_grid
from casa_digits.tower import encode, patchify

SCENES = 4
TAKES = 2
FAMILIES_AT_ONCE = 16


@dataclass(frozen=True)
class FramePool:
    """Encoded images; image i is take `i % 2` of scene `i // 2 % 4` of family `i // 8`.

    Attributes:
        tokens: per image, (cells, C) float32 image tokens.
        grids: per image, its size.
        texts: per image, what there is to read.
    """

    tokens: list[Tensor]
    grids: list[Grid]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rng: np.random.Generator, image: int) -> int:
        """The same scene, in one of its takes."""
        return image - image % TAKES + int(rng.integers(TAKES))

    def sibling(self, rng: np.random.Generator, image: int) -> int:
        """Any image of the same family."""
        size = SCENES * TAKES
        return image - image % size + int(rng.integers(size))

    def any(self, rng: np.random.Generator) -> int:
        """Any image at all."""
        return int(rng.integers(len(self)))


@torch.no_grad()
def fill_pool(
    rng: np.random.Generator, tower: Qwen2_5_VisionTransformerPretrainedModel, bank: GlyphBank, num_families: int
) -> FramePool:
    """Draw and encode `num_families` families (rounded up to a multiple of 16)."""
    pool = FramePool([], [], [])
    for _ in tqdm(range(-(-num_families // FAMILIES_AT_ONCE)), desc="frames", mininterval=5.0):
        grid = draw_grid(rng)
        scenes = [draw_scenes(rng, bank, grid, FAMILIES_AT_ONCE)]
        scenes += [edit_scenes(rng, bank, scenes[0]) for _ in range(SCENES - 1)]
        takes = []
        for scene in scenes:
            clean = scene.draw(bank)
            takes += [add_noise(rng, clean, 0.15), add_noise(rng, clean, 1.0)]
        pixels = np.stack(takes, axis=1).reshape(-1, *takes[0].shape[1:])
        digits = np.stack([scene.digits(bank) for scene in scenes], axis=1).repeat(TAKES, axis=1)
        pool.tokens.extend(encode(tower, patchify(pixels), grid).unbind(0))
        pool.grids.extend([grid] * len(pixels))
        pool.texts.extend(" ".join(str(d) for d in row if d != EMPTY) for row in digits.reshape(len(pixels), -1))
    return pool
