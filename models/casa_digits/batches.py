"""Many augmented training images of one grid at once.

The same images as `data.draw_image` describes, as arrays: one by one would cost more than a training step. A scene is
an image before it is drawn, so that a stream's next frame can be a small edit of it.
"""

from dataclasses import dataclass, replace

import numpy as np

from casa_digits.augment import GlyphBank, camera_noise, draw_training_colours
from casa_digits.data import CELL_PX, MAX_DIGITS, Grid

EMPTY = -1  # a place without a digit


@dataclass(frozen=True)
class Scenes:
    """B images of one grid, not drawn yet. Digits are in reading order; -1 fills the places of missing ones.

    Attributes:
        grid: size in cells.
        glyphs: (B, 4) int64, index into the `GlyphBank`.
        cells: (B, 4) int64, row-major.
        places: (B, 4, 2) float, where in its cell a glyph is, 0..1 down and right.
        ink, paper: (B, 3) colours in 0..1.
    """

    grid: Grid
    glyphs: np.ndarray
    cells: np.ndarray
    places: np.ndarray
    ink: np.ndarray
    paper: np.ndarray

    @property
    def num_digits(self) -> np.ndarray:
        """(B,) int64."""
        return (self.glyphs != EMPTY).sum(axis=1)

    def digits(self, bank: GlyphBank) -> np.ndarray:
        """Return the digits, (B, 4) int64, -1 where an image has fewer."""
        return np.where(self.glyphs != EMPTY, bank.labels[self.glyphs], EMPTY)

    def draw(self, bank: GlyphBank) -> np.ndarray:
        """Draw the images, (B, H, W, 3) uint8."""
        masks = np.zeros((len(self.glyphs), self.grid.rows * CELL_PX, self.grid.columns * CELL_PX), np.uint8)
        used = self.glyphs != EMPTY
        images, glyphs = np.nonzero(used)[0], self.glyphs[used]
        sizes = bank.sizes[glyphs]
        corners = np.stack(np.divmod(self.cells[used], self.grid.columns), axis=1) * CELL_PX
        corners += np.floor(self.places[used] * (CELL_PX + 1 - sizes)[:, None]).astype(np.int64)
        for image, glyph, size, (top, left) in zip(images, glyphs, sizes, corners, strict=True):
            masks[image, top : top + size, left : left + size] = bank.ink[glyph, :size, :size]
        return paint_batch(masks, self.ink, self.paper)


def draw_scenes(
    rng: np.random.Generator, bank: GlyphBank, grid: Grid, count: int, num_digits: np.ndarray | None = None
) -> Scenes:
    """Draw `count` random scenes, each with 1 to 4 digits (or `num_digits`, (count,))."""
    if num_digits is None:
        num_digits = rng.integers(1, grid.max_digits + 1, count)
    used = np.arange(MAX_DIGITS) < num_digits[:, None]
    order = np.argsort(rng.random((count, max(grid.num_cells, MAX_DIGITS))), axis=1)
    if grid.num_cells < MAX_DIGITS:
        order = np.argsort(rng.random((count, grid.num_cells)), axis=1)
        order = np.pad(order, ((0, 0), (0, MAX_DIGITS - grid.num_cells)))
    cells = np.sort(np.where(used, order[:, :MAX_DIGITS], grid.num_cells), axis=1)
    return Scenes(
        grid,
        np.where(used, rng.integers(0, len(bank.labels), (count, MAX_DIGITS)), EMPTY),
        np.where(used, cells, EMPTY),
        rng.random((count, MAX_DIGITS, 2)),
        *draw_training_colours(rng, count),
    )


def edit_scenes(rng: np.random.Generator, bank: GlyphBank, scenes: Scenes) -> Scenes:
    """Draw a later frame: another image, one digit exchanged or gone, or the same digits drawn anew."""
    count = len(scenes.glyphs)
    other = draw_scenes(rng, bank, scenes.grid, count)
    redrawn = draw_scenes(rng, bank, scenes.grid, count, scenes.num_digits)
    glyphs, cells, places = (array.copy() for array in (scenes.glyphs, scenes.cells, scenes.places))
    ink, paper = scenes.ink.copy(), scenes.paper.copy()
    for index, (kind, length) in enumerate(zip(rng.random(count), scenes.num_digits, strict=True)):
        slot = int(rng.integers(0, length))
        if kind < 0.3:
            glyphs[index, slot] = rng.integers(0, len(bank.labels))
        elif kind < 0.45 and length > 1:
            glyphs[index] = np.append(np.delete(glyphs[index], slot), EMPTY)
            cells[index] = np.append(np.delete(cells[index], slot), EMPTY)
            places[index] = np.append(np.delete(places[index], slot, axis=0), np.zeros((1, 2)), axis=0)
        elif kind < 0.6:
            labels = bank.labels[glyphs[index, :length]]
            glyphs[index, :length] = [rng.choice(bank.of_label[label]) for label in labels]
            cells[index], places[index] = redrawn.cells[index], redrawn.places[index]
            ink[index], paper[index] = redrawn.ink[index], redrawn.paper[index]
        else:
            glyphs[index], cells[index], places[index] = other.glyphs[index], other.cells[index], other.places[index]
            if kind < 0.8:
                ink[index], paper[index] = other.ink[index], other.paper[index]
    return replace(scenes, glyphs=glyphs, cells=cells, places=places, ink=ink, paper=paper)


def add_noise(rng: np.random.Generator, pixels: np.ndarray, share: float) -> np.ndarray:
    """Make `share` of (B, H, W, 3) images look as if they came from a camera or a codec."""
    pixels = pixels.copy()
    for index in np.flatnonzero(rng.random(len(pixels)) < share):
        pixels[index] = camera_noise(rng, pixels[index])
    return pixels


def paint_batch(masks: np.ndarray, ink: np.ndarray, paper: np.ndarray) -> np.ndarray:
    """Mix ink (B, H, W) uint8 and two (B, 3) colours in 0..1 to (B, H, W, 3) uint8."""
    table = np.arange(256, dtype=np.float32)[:, None] / 255.0
    colours = ((paper[:, None] + table * (ink - paper)[:, None]) * 255.0 + 0.5).astype(np.uint8)
    return colours[np.arange(len(masks))[:, None, None], masks]
