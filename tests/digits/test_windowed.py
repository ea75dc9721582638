"""The training forward gives the loss of the eager reference, and of the equations where that cannot show a window."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from casa_digits.augment import make_bank
from casa_digits.conversations import IGNORED, NOTE_CLASSES, NOTES, UNSEEN, Writer
from casa_digits.data import load_samples
from casa_digits.frames import fill_pool
from casa_digits.model import MAX_POSITIONS, build_model
from casa_digits.practice import NamesWriter, PracticeWriter
from casa_digits.tokenizer import build_tokenizer
from casa_digits.windowed import build_batch, loss_of
from casa_engine.image_inputs import pad_insertion_points
from equations import logits


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


@pytest.mark.parametrize("kind", ["chat", "memory", "stream", "form", "tools"])
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


def loss_of_equations(model, talks, pool):
    """The same rows by the paper's equations in float64; an image that is not shown has no tokens, but its place."""
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    losses = []
    for talk in talks:
        shown = [image != UNSEEN for image in talk.images]
        images = [
            pool.tokens[image].double().numpy() if seen else np.zeros((0, 128))
            for image, seen in zip(talk.images, shown, strict=True)
        ]
        grids = [
            (pool.grids[image].rows, pool.grids[image].columns) if seen else (0, 0)
            for image, seen in zip(talk.images, shown, strict=True)
        ]
        scores = torch.from_numpy(logits(talk.ids, images, talk.points, grids, weights, model.config))[:-1]
        labels = torch.tensor(talk.labels[1:])
        losses.append(
            functional.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="none")[labels != IGNORED]
        )
    return torch.cat(losses).mean()


@torch.inference_mode()
def test_windows_of_images_that_are_not_shown(parts):
    """Frames of the past in a stream, and names of tools that stand in another window than the question."""
    model, pool, writer = parts
    practice, names = (kind(writer.tokenizer, np.random.default_rng(1)) for kind in (PracticeWriter, NamesWriter))
    talks = [practice.stream(pool, 60, text_only=True), names.copies(pool)]
    mixed = (practice.stream(pool, 60) for _ in range(100))
    talks.append(next(talk for talk in mixed if UNSEEN in talk.images and set(talk.images) != {UNSEEN}))
    loss = loss_of(model, build_batch(model, talks, pool)).double()
    torch.testing.assert_close(loss, loss_of_equations(model, talks, pool), rtol=1e-5, atol=1e-5)
    for talk in talks:
        talk.points, talk.images = [], []
    assert abs(loss_of(model, build_batch(model, talks, pool)) - loss) > 1e-3, "the windows can be seen in the loss"


@torch.inference_mode()
def test_notes_are_learned_half_as_heavily(parts):
    """From what the eager reference holds after so many layers."""
    model, pool, writer = parts
    talks = [writer.memory(pool) for _ in range(6)]
    batch, head, states = build_batch(model, talks, pool), torch.nn.Linear(128, NOTES * NOTE_CLASSES), []
    with model.model.language_model.layers[1].register_forward_hook(lambda *call: states.append(call[-1])):
        eager = eager_loss(model, talks, pool, batch)
    scores = head(states[0]).unflatten(2, (NOTES, NOTE_CLASSES))
    notes = [(row, *note) for row, talk in enumerate(talks) for note in talk.notes]
    losses = [
        functional.cross_entropy(scores[row, token, kind], torch.tensor(value)) for row, token, kind, value in notes
    ]
    assert len(losses) > 50
    expected = eager + 0.5 * torch.stack(losses).mean()
    torch.testing.assert_close(loss_of(model, batch, head, note_layer=2), expected, rtol=1e-5, atol=1e-5)
    for talk in talks:
        talk.notes.clear()
    without = loss_of(model, build_batch(model, talks, pool), head, note_layer=2)
    torch.testing.assert_close(without, eager, rtol=1e-5, atol=1e-5)
