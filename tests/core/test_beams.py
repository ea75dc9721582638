"""Several answers to one prompt: beams and samples, with images, equal to the prompt repeated; and the cache's rows."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from casa_engine.cache import CasaCache
from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.errors import InputError
from casa_engine.presets import preset_config
from chats import picture, prepare, user

CHATS = [
    [user("What?", picture(56, 84), "and", picture(84, 56))],
    [user("Hello")],
    [user(picture(61, 50), "a longer question about the only picture")],
]
LENGTH = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["ca", "ca_tv", "insertion"])
def parts(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_random_checkpoint(preset_config("tiny-qwen", fusion=request.param), folder)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_beams_with_and_without_a_cache_and_alone(parts, monkeypatch) -> None:
    """Without a cache nothing is reordered: it is the reference. Each row gets the beams that it gets alone."""
    model, processor = parts
    moved = []
    original = CasaCache.reorder_cache
    monkeypatch.setattr(CasaCache, "reorder_cache", lambda self, idx: (moved.append(idx.tolist()), original(self, idx)))
    batch = prepare(processor, CHATS)
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, **LENGTH}
    together = model.generate(**batch, **options)
    assert any(idx != list(range(9)) for idx in moved), "no beam changed places: the test would show nothing"
    assert torch.equal(model.generate(**batch, use_cache=False, **options), together)
    for row, chat in enumerate(CHATS):
        inputs = prepare(processor, chat)
        alone = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(together[2 * row : 2 * row + 2, batch["input_ids"].shape[1] :], alone)


def test_sampled_answers_equal_the_repeated_prompt(parts) -> None:
    model, processor = parts
    options = {"do_sample": True, **LENGTH}
    torch.manual_seed(0)
    answers = model.generate(**prepare(processor, CHATS), num_return_sequences=2, **options)
    torch.manual_seed(0)
    repeated = model.generate(**prepare(processor, [chat for chat in CHATS for _ in range(2)]), **options)
    assert torch.equal(answers, repeated)
    assert not torch.equal(answers[0], answers[1])


def test_sampled_beams_with_and_without_a_cache(parts) -> None:
    """Beams of one prompt draw together, those of a repeated one apart: the reference is the same without a cache."""
    model, processor = parts
    options = {"num_beams": 2, "num_return_sequences": 2, "do_sample": True, **LENGTH}
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        answers.append(model.generate(**prepare(processor, CHATS), use_cache=use_cache, **options))
    assert answers[0].shape[0] == 6
    assert torch.equal(*answers)


def test_images_are_encoded_once_for_all_beams(parts, monkeypatch) -> None:
    model, processor = parts
    encoded = []
    original = model.model.encode_images
    monkeypatch.setattr(
        model.model, "encode_images", lambda pixels, grids: (encoded.append(len(grids)), original(pixels, grids))[1]
    )
    model.generate(**prepare(processor, CHATS), num_beams=4, do_sample=False, **LENGTH)
    assert encoded == [3]


def run(model, cache, ids, **inputs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, **inputs).logits


@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_rows_of_the_cache_move_with_all_that_is_theirs(parts, method: str) -> None:
    """After the move each row goes on, text and a further image, as the row that it was."""
    model, processor = parts
    batch, cache = prepare(processor, CHATS), model.new_cache()
    run(model, cache, **dict(ids=batch.pop("input_ids")), **batch)
    rows = {"reorder_cache": [2, 0, 0], "batch_select_indices": [2, 1], "batch_repeat_interleave": [0, 0, 1, 1, 2, 2]}
    rows = rows[method]
    moved = copy.deepcopy(cache)
    getattr(moved, method)(2 if method == "batch_repeat_interleave" else torch.tensor(rows))
    ids = torch.tensor([[5], [6], [7]])
    before, after = run(model, cache, ids), run(model, moved, ids[rows])
    torch.testing.assert_close(after, before[rows], rtol=1e-5, atol=1e-5)
    assert [moved.row_ids(row) for row in range(len(rows))] == [cache.row_ids(row) for row in rows]
    further = dict(prepare(processor, [[user("More", picture(28, 28))]] * 3))
    fewer = dict(prepare(processor, [[user("More", picture(28, 28))]] * len(rows)))
    before = run(model, cache, further.pop("input_ids"), **further)
    after = run(model, moved, fewer.pop("input_ids"), **fewer)
    torch.testing.assert_close(after, before[rows], rtol=1e-5, atol=1e-5)


def test_rows_chosen_by_a_mask_and_an_empty_cache(parts) -> None:
    model, processor = parts
    cache = model.new_cache()
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(3)
    batch = prepare(processor, CHATS)
    run(model, cache, batch.pop("input_ids"), **batch)
    rows = [cache.row_ids(row) for row in range(3)]
    cache.batch_select_indices(torch.tensor([False, True, True]))
    assert len(cache.key_positions) == len(cache.token_ids) == 2
    assert [cache.row_ids(row) for row in range(2)] == rows[1:]
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = torch.tensor([[5, 6]])
    assert torch.equal(run(model, cache, ids), run(model, model.new_cache(), ids))


def test_what_cannot_be_is_refused_before_anything_is_done(parts) -> None:
    model, processor = parts
    inputs = dict(prepare(processor, CHATS[0]))
    with pytest.raises(InputError, match="CASA has one cache"):
        model.generate(**inputs, cache_implementation="static", **LENGTH)
    with pytest.raises(InputError, match="prefill_chunk_size cuts text"):
        model.generate(**inputs, prefill_chunk_size=4, **LENGTH)
    cache = model.new_cache()
    run(model, cache, torch.tensor([[5, 6]]))
    with pytest.raises(InputError, match="1 conversations; got 2 rows"):
        model.generate(torch.tensor([[5, 6, 7]]), past_key_values=cache, num_beams=2, **LENGTH)
