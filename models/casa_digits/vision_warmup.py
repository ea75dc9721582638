"""Stage 1: teaches the vision tower alone, with a truth for every cell.

Each image token covers one 28-px cell. A throw-away linear head reads two things from it: which digit is here (or
none), and the how-manieth in reading order is it. This is a far denser signal than an answer of a few tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from casa_digits.augment import GlyphBank, make_bank
from casa_digits.batches import EMPTY, add_noise, draw_scenes
from casa_digits.data import MAX_DIGITS, DigitSamples, Grid, draw_grid, draw_image
from casa_digits.schedule import cosine_rate
from casa_digits.tower import encode, patchify

BLANK = 10
NUM_CLASSES = 11
NOISY_SHARE = 0.25
FULL_SHARE = 0.4  # of the images get as many digits as they can hold: the order of four is the hard part
NUM_RANKS = MAX_DIGITS + 1


@dataclass(frozen=True)
class CellBatch:
    """Images of one grid and the truth of each cell.

    Attributes:
        patches: (B, P, 588) float32.
        digits: (B, cells) int64, 10 for a blank cell.
        ranks: (B, cells) int64, 1..4 in reading order, 0 for a blank cell.
    """

    grid: Grid
    patches: Tensor
    digits: Tensor
    ranks: Tensor


class CellHead(nn.Module):
    """Digit and reading rank of each image token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.digit = nn.Linear(width, NUM_CLASSES)
        self.rank = nn.Linear(width, NUM_RANKS)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map (..., C) to logits (..., 11) of the digit and (..., 5) of the rank."""
        tokens = self.norm(tokens)
        return self.digit(tokens), self.rank(tokens)


def draw_cells(rng: np.random.Generator, bank: GlyphBank, grid: Grid, count: int) -> CellBatch:
    """Draw a training batch of augmented images with the truth of each cell."""
    num_digits = rng.integers(1, grid.max_digits + 1, count)
    num_digits[rng.random(count) < FULL_SHARE] = grid.max_digits
    scenes = draw_scenes(rng, bank, grid, count, num_digits)
    pixels = add_noise(rng, scenes.draw(bank), NOISY_SHARE)
    digits = np.full((count, grid.num_cells), BLANK)
    ranks = np.zeros((count, grid.num_cells), np.int64)
    images, places = np.nonzero(scenes.cells != EMPTY)
    cells = scenes.cells[images, places]
    digits[images, cells] = scenes.digits(bank)[images, places]
    ranks[images, cells] = places + 1
    return CellBatch(grid, patchify(pixels), torch.from_numpy(digits), torch.from_numpy(ranks))


def loss_of(tower: nn.Module, head: CellHead, batch: CellBatch) -> Tensor:
    """Compute the cross-entropy of both; cells with a digit count as much as all blank ones together."""
    digit_logits, rank_logits = head(encode(tower, batch.patches, batch.grid))
    weight = torch.where(batch.ranks.flatten() > 0, 1.0, 0.25)
    losses = functional.cross_entropy(digit_logits.flatten(0, 1), batch.digits.flatten(), reduction="none")
    losses = losses + functional.cross_entropy(rank_logits.flatten(0, 1), batch.ranks.flatten(), reduction="none")
    return (losses * weight).sum() / weight.sum()


@torch.no_grad()
def measure_accuracy(
    tower: nn.Module, head: CellHead, rng: np.random.Generator, samples: DigitSamples, count: int
) -> dict:
    """Measure the share of digits, of ranks and of whole images that the head gets right on images of `samples`."""
    right = {"digit": [], "rank": [], "image": []}
    for _ in range(count):
        image = draw_image(rng, samples)
        digit_logits, rank_logits = head(encode(tower, patchify(image.pixels[None]), image.layout.grid))
        ranks = np.zeros(image.layout.grid.num_cells, np.int64)
        ranks[image.layout.cells] = np.arange(1, len(image.digits) + 1)
        digits_right = digit_logits[0].argmax(-1).numpy()[image.layout.cells] == np.array(image.digits)
        ranks_right = rank_logits[0].argmax(-1).numpy() == ranks
        right["digit"] += digits_right.tolist()
        right["rank"] += ranks_right[image.layout.cells].tolist()
        right["image"].append(bool(digits_right.all() and ranks_right.all()))
    return {name: float(np.mean(values)) for name, values in right.items()}


def warm_up(
    tower: Qwen2_5_VisionTransformerPretrainedModel,
    rng: np.random.Generator,
    samples: DigitSamples,
    num_steps: int,
    cells_per_step: int = 512,
    peak_rate: float = 1.5e-3,
    variants: int = 40,
) -> CellHead:
    """Train the tower and return the head that it was trained with.

    Args:
        tower: What is trained.
        rng: Source of all randomness of the images.
        samples: The digits to draw.
        num_steps: Optimiser steps; the learning rate falls in a cosine over them.
        cells_per_step: Image tokens of a batch, so that all grids cost about the same.
        peak_rate: Highest learning rate.
        variants: Augmented glyphs per sample; they are drawn anew every 1,000 steps.

    Mutates:
        tower: its weights.
        torch's global generator: the head's first weights are drawn from it.
    """
    head = CellHead(tower.config.out_hidden_size)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_rate(step, num_steps))
    bank = make_bank(rng, samples, variants)
    progress = tqdm(range(num_steps), desc="vision", mininterval=5.0)
    for step in progress:
        if step and step % 1000 == 0:
            bank = make_bank(rng, samples, variants)
        grid = draw_grid(rng)
        batch = draw_cells(rng, bank, grid, min(128, cells_per_step // grid.num_cells))
        loss = loss_of(tower, head, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return head
