"""The batched forward used in training is the vision tower that is served."""

import numpy as np
import torch

from casa_digits.data import Grid, draw_image, load_samples
from casa_digits.model import MAX_POSITIONS, build_model, build_processor, cosine_filters
from casa_digits.tokenizer import build_tokenizer
from casa_digits.tower import encode, patchify


@torch.inference_mode()
def test_batched_tower_equals_the_served_path():
    tokenizer = build_tokenizer(MAX_POSITIONS)
    model, processor = build_model(tokenizer, 0).eval(), build_processor(tokenizer)
    samples, rng = load_samples(held_out=False), np.random.default_rng(0)
    for grid in (Grid(1, 1), Grid(2, 3), Grid(4, 8)):
        images = [draw_image(rng, samples, grid) for _ in range(3)]
        served = model.model.encode_images(**processor.process_images([image.to_pil() for image in images]))
        trained = encode(model.model.visual, patchify(np.stack([image.pixels for image in images])), grid)
        torch.testing.assert_close(trained.flatten(0, 1), served, rtol=1e-4, atol=1e-4)


def test_cosine_filters_are_orthonormal():
    filters = cosine_filters(60).flatten(1)
    torch.testing.assert_close(filters @ filters.T, torch.eye(60), rtol=0, atol=1e-5)
