"""The training forward gives the loss of the eager reference."""

import numpy as np
import pytest
import torch

from casa_digits.augment import make_bank
from casa_digits.conversations import Writer
from casa_digits.data import load_samples
from casa_digits.frames import fill_pool
from casa_digits.model import MAX_POSITIONS, build_model
from casa_digits.tokenizer import build_tokenizer
from casa_digits.windowed import build_batch, loss_of
from casa_engine.image_inputs import pad_insertion_points


@pytest.fixture(scope="module")
def parts():
    rng, tokenizer = np.random.default_rng(0), build_tokenizer(MAX_POSITIONS)
    model = build_model(tokenizer, 0).eval()
    bank = make_bank(rng, load_samples(held_out=False), 1)
    return model, fill_pool(rng, model.model.visual, bank, 32), Writer(tokenizer, rng)


def eager_loss(model, talks, pool, batch):
    """The same rows through `CasaForConditionalGeneration`, with every shown image as an image of its own."""
    grids = [pool.grids[image] for talk in talks for image in talk.images]
    images = {}
    if grids:
        images = {
            "image_embeds": torch.cat([pool.tokens[image] for talk in talks for image in talk.images]),
            "image_grid_thw": torch.tensor([[1, 2 * grid.rows, 2 * grid.columns] for grid in grids]),
            "insertion_points": pad_insertion_points([talk.points for talk in talks]),
        }
    lengths = torch.tensor([len(talk.ids) for talk in talks])
    mask = (torch.arange(batch.input_ids.shape[1]) < lengths[:, None]).long()
    return model(batch.input_ids, attention_mask=mask, labels=batch.labels, **images).loss


@pytest.mark.parametrize("kind", ["chat", "memory", "stream"])
def test_training_and_eager_losses_agree(parts, kind):
    model, pool, writer = parts
    talks = [writer.stream(pool, 150) if kind == "stream" else getattr(writer, kind)(pool) for _ in range(8)]
    batch = build_batch(model, talks, pool)
    torch.testing.assert_close(loss_of(model, batch), eager_loss(model, talks, pool, batch), rtol=1e-5, atol=1e-5)


def test_adjacent_images_share_a_window(parts):
    """At the start, inside and at the end of a row, the same image twice too."""
    model, pool, writer = parts
    talks = [writer.chat(pool) for _ in range(3)]
    end = len(talks[2].ids)
    shown = [([0, 0], [3, 3]), ([2, 5, 5, 5], [1, 7, 2, 7]), ([4, end, end], [5, 6, 5])]
    for talk, (points, images) in zip(talks, shown, strict=True):
        talk.points, talk.images = points, images
    batch = build_batch(model, talks, pool)
    torch.testing.assert_close(loss_of(model, batch), eager_loss(model, talks, pool, batch), rtol=1e-5, atol=1e-5)


def test_rows_without_images(parts):
    model, pool, writer = parts
    talks = [talk for talk in (writer.stream(pool, 40) for _ in range(50)) if not talk.images] or [writer._begin()]
    for talk in talks[:1]:
        talk.append(writer.spell("3 1<|im_end|>"), learn=True)
    batch = build_batch(model, talks[:1], pool)
    torch.testing.assert_close(loss_of(model, batch), eager_loss(model, talks[:1], pool, batch), rtol=1e-5, atol=1e-5)
