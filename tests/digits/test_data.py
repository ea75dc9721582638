"""The images are what the specification says, and training never sees a held-out digit."""

from dataclasses import replace

import numpy as np
import pytest

from casa_digits.augment import draw_training_colours, linear_luminance, make_bank
from casa_digits.batches import EMPTY, draw_scenes, edit_scenes
from casa_digits.data import (
    CELL_PX,
    MIN_LUMINANCE_DIFFERENCE,
    Grid,
    draw_colours,
    draw_image,
    load_samples,
    luminance,
    upscale,
)

pytestmark = pytest.mark.unit


def test_held_out_samples_are_the_multiples_of_five():
    trained, held_out = load_samples(held_out=False), load_samples(held_out=True)
    assert (held_out.indices % 5 == 0).all() and (trained.indices % 5 != 0).all()
    assert sorted([*trained.indices, *held_out.indices]) == list(range(1797))


def test_the_same_generator_draws_the_same_image():
    samples = load_samples(held_out=True)
    first, second = (draw_image(np.random.default_rng(3), samples) for _ in range(2))
    assert first.digits == second.digits and (first.pixels == second.pixels).all()


def test_images_hold_their_digits_in_different_cells_in_reading_order():
    samples, rng = load_samples(held_out=True), np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        image = draw_image(rng, samples)
        layout = image.layout
        assert image.pixels.shape == (layout.grid.rows * CELL_PX, layout.grid.columns * CELL_PX, 3)
        assert 1 <= len(image.digits) <= 4 and (np.diff(layout.cells) > 0).all()
        assert ((layout.sizes >= 22) & (layout.sizes <= 28)).all()
        assert ((layout.offsets >= 0) & (layout.offsets + layout.sizes[:, None] <= CELL_PX)).all()
        assert image.text == " ".join(str(label) for label in samples.labels[layout.samples])
        seen.add((layout.grid.rows, layout.grid.columns))
    assert len(seen) == 32, "every grid size occurs"


def test_pixels_outside_the_digits_are_paper_and_inside_are_between_ink_and_paper():
    samples, rng = load_samples(held_out=True), np.random.default_rng(1)
    for _ in range(50):
        image = draw_image(rng, samples)
        colours, layout = image.colours, image.layout
        assert abs(luminance(colours.ink) - luminance(colours.paper)) >= MIN_LUMINANCE_DIFFERENCE
        blank = np.ones(image.pixels.shape[:2], bool)
        for cell, size, (top, left) in zip(layout.cells, layout.sizes, layout.offsets, strict=True):
            row, column = divmod(int(cell), layout.grid.columns)
            blank[row * CELL_PX + top :, column * CELL_PX + left :][:size, :size] = False
        assert (image.pixels[blank] == np.round(colours.paper * 255)).all()
        low, high = np.minimum(colours.ink, colours.paper) * 255, np.maximum(colours.ink, colours.paper) * 255
        assert (image.pixels >= np.floor(low)).all() and (image.pixels <= np.ceil(high)).all()


def test_upscaling_is_pils_resize():
    from PIL import Image

    image = load_samples(held_out=True).images[7]
    expected = np.asarray(Image.fromarray(image).resize((25, 25), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(upscale(image, 25, "bilinear"), expected, atol=1e-5)


def test_a_grid_outside_the_specification_is_refused():
    with pytest.raises(ValueError, match=r"expected 1\.\.4 rows and 1\.\.8 columns"):
        Grid(5, 2)


def test_drawn_colours_differ_in_luminance():
    rng = np.random.default_rng(0)
    for _ in range(200):
        colours = draw_colours(rng)
        assert abs(luminance(colours.ink) - luminance(colours.paper)) >= 0.4


def test_training_scenes_obey_the_layout_too():
    rng = np.random.default_rng(0)
    bank = make_bank(rng, load_samples(held_out=False), 1)
    for grid in (Grid(1, 1), Grid(1, 3), Grid(4, 8)):
        scenes = draw_scenes(rng, bank, grid, 64)
        for scene in (scenes, edit_scenes(rng, bank, scenes)):
            used = scene.cells != EMPTY
            assert (used == (scene.glyphs != EMPTY)).all()
            assert ((scene.num_digits >= 1) & (scene.num_digits <= grid.max_digits)).all()
            assert (scene.cells[used] < grid.num_cells).all()
            assert all((np.diff(cells[cells != EMPTY]) > 0).all() for cells in scene.cells)
            assert scene.draw(bank).shape == (64, grid.rows * CELL_PX, grid.columns * CELL_PX, 3)


def test_the_glyph_bank_is_made_of_its_samples_only():
    training, held_out = load_samples(held_out=False), load_samples(held_out=True)
    assert not set(training.indices) & set(held_out.indices)
    bank = make_bank(np.random.default_rng(0), training, 2)
    assert (bank.labels == np.tile(training.labels, 2)).all()
    # Every glyph is its own sample's: where a sample is empty, its glyphs are, and no other's.
    samples = replace(training, images=training.images.copy())
    samples.images[3::7] = 0.0
    blank = np.tile(np.arange(len(samples)) % 7 == 3, 2)
    ink = make_bank(np.random.default_rng(0), samples, 2).ink.reshape(len(blank), -1)
    assert ((ink.max(axis=1) == 0) == blank).all()
    assert all((bank.labels[glyphs] == digit).all() for digit, glyphs in enumerate(bank.of_label))


def test_training_colours_differ_in_luminance_by_one_definition_or_the_other():
    ink, paper = draw_training_colours(np.random.default_rng(0), 500)
    luma = np.abs(luminance(ink) - luminance(paper))
    linear = np.abs(linear_luminance(ink) - linear_luminance(paper))
    assert ink.shape == paper.shape == (500, 3)
    assert (np.maximum(luma, linear) >= MIN_LUMINANCE_DIFFERENCE - 1e-6).all()
