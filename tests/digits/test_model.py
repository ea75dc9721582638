"""How the weights start: a seed decides them, and a deeper model computes the same as the one before."""

import numpy as np
import pytest
import torch

from casa_digits.data import Grid, draw_image, load_samples
from casa_digits.model import DEEPER, MAX_POSITIONS, build_model, build_processor, deepen
from casa_digits.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(MAX_POSITIONS)


def test_a_deeper_model_draws_from_a_source_of_its_own(tokenizer):
    """The tower's training draws after it: whether a deeper model was made before must not be seen there."""
    model = build_model(tokenizer, 0)
    state = torch.get_rng_state()
    first = deepen(model, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    new = DEEPER.index(None)
    for seed, same in ((3, True), (4, False)):
        layers = [deeper.model.language_model.layers[new] for deeper in (first, deepen(model, seed))]
        assert torch.equal(*(layer.mlp.gate_proj.weight for layer in layers)) is same


@torch.inference_mode()
def test_a_deeper_model_computes_the_same(tokenizer):
    model, processor = build_model(tokenizer, 0).eval(), build_processor(tokenizer)
    images = [draw_image(np.random.default_rng(0), load_samples(held_out=False), Grid(2, 3)).to_pil()] * 2
    content = [{"type": "image"}, {"type": "text", "text": "Read the digits."}, {"type": "image"}]
    inputs = processor(images=images, text=processor.apply_chat_template([{"role": "user", "content": content}]))
    deeper = deepen(model, 0).eval()
    assert len(deeper.model.language_model.layers) == len(DEEPER) > len(model.model.language_model.layers)
    torch.testing.assert_close(deeper(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)
