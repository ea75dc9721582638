"""What a model cannot take is refused as InputError, in forward and `generate`, and the cache stays as it was."""

import pytest
import torch
from transformers import DynamicCache

from bad_calls import BAD_CALLS, good_call, words_of
from casa_engine.errors import InputError
from casa_engine.streaming import CasaStream
from snapshots import snapshot


@pytest.fixture(params=["ca", "ca_tv"])
def conversation(request, tiny):
    """A model and a cache with a turn of two rows in it."""
    model = tiny("tiny-qwen", fusion=request.param)
    cache = model.new_cache()
    with torch.no_grad():
        model(**good_call(1), past_key_values=cache)
    return model, cache


def next_logits(model, cache) -> torch.Tensor:
    with torch.no_grad():
        return model(**good_call(2), past_key_values=cache).logits


@pytest.mark.parametrize("name", BAD_CALLS)
def test_forward(conversation, name: str) -> None:
    model, cache = conversation
    before = snapshot(cache)
    with pytest.raises(InputError, match=words_of(name)), torch.no_grad():
        model(**BAD_CALLS[name]({"past_key_values": cache} | good_call()))
    assert snapshot(cache) == before


def test_the_turn_after_all_of_them(conversation) -> None:
    """One cache, every bad call, then a good one: the logits of a cache that has seen no bad call."""
    model, cache = conversation
    for change in BAD_CALLS.values():
        with pytest.raises(InputError), torch.no_grad():
            model(**change({"past_key_values": cache} | good_call()))
    clean = model.new_cache()
    with torch.no_grad():
        model(**good_call(1), past_key_values=clean)
    assert torch.equal(next_logits(model, cache), next_logits(model, clean))


OF_FORWARD = ("logits_to_keep", "ids: more rows", "ids: None", "cache")


@pytest.mark.parametrize("name", [name for name in BAD_CALLS if not name.startswith(OF_FORWARD)])
def test_generate(conversation, name: str) -> None:
    """Without a cache, and over one with the whole conversation: nothing is generated, the cache is as it was."""
    model, cache = conversation
    for over in ({}, {"past_key_values": cache}):
        before = snapshot(cache)
        with pytest.raises(InputError, match=words_of(name)):
            model.generate(**BAD_CALLS[name](good_call()), **over, max_new_tokens=2, do_sample=False)
        assert snapshot(cache) == before


def test_another_cache_is_refused(conversation) -> None:
    model, _ = conversation
    for call in (model, model.generate):
        with pytest.raises(InputError, match="is a DynamicCache; expected a CasaCache"):
            call(torch.tensor([[5, 6]]), past_key_values=DynamicCache())


def test_rows_without_any_text(conversation) -> None:
    model, cache = conversation
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(InputError, match=r"rows \[1\] have no text"):
        model(torch.full((2, 2), 5), attention_mask=mask)
    with torch.no_grad():  # a row that has text already may wait while others go on
        model(torch.full((2, 2), 5), attention_mask=mask, past_key_values=cache)
    assert [len(cache.row_ids(row)) for row in range(2)] == [9, 5]


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(2, 6, dtype=torch.long),
        torch.zeros(7, dtype=torch.long),
        torch.zeros(2, 7),
        torch.full((2, 7), 384),
        torch.full((2, 7), -1),
        [[0] * 7] * 2,
    ],
)
def test_labels(conversation, labels) -> None:
    model, cache = conversation
    before = snapshot(cache)
    with pytest.raises(InputError, match="labels"):
        model(**good_call(), labels=labels, past_key_values=cache)
    assert snapshot(cache) == before


def test_a_mask_that_hides_cached_tokens(conversation) -> None:
    model, cache = conversation
    before = snapshot(cache)
    mask = torch.ones(2, 14, dtype=torch.long)  # the second row's first two cached columns are padding
    with pytest.raises(InputError, match="hides other cached tokens"):
        model(torch.full((2, 7), 5), attention_mask=mask, past_key_values=cache)
    assert snapshot(cache) == before
    mask[1, :2] = 0
    with torch.no_grad():
        model(torch.full((2, 7), 5), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("where", ["encode_images", "norm", "layer"])
def test_a_call_that_fails_on_its_way(conversation, monkeypatch, where: str) -> None:
    """Memory that runs out, an interrupt: the cache is as it was, as long before and as empty."""

    def fail(*args, **kwargs):
        raise MemoryError("no memory")

    model, cache = conversation
    text = model.model.language_model
    owner = {"encode_images": model.model, "norm": text.norm, "layer": text.layers[-1].mlp}[where]
    for each in (cache, model.new_cache()):
        before = snapshot(each)
        with monkeypatch.context() as patch, pytest.raises(MemoryError), torch.no_grad():
            patch.setattr(owner, "encode_images" if where == "encode_images" else "forward", fail)
            model(**good_call(), past_key_values=each)
        assert snapshot(each) == before
    next_logits(model, cache)


@pytest.mark.parametrize("points", [[9], [-1], [2, 1], [1], [1, 1, 1], [0.5], []])
def test_stream(tiny, points: list) -> None:
    model = tiny("tiny-qwen", fusion="ca_tv")
    stream = CasaStream(model, stop_token_ids=[])
    stream.feed([5, 6, 7])
    before, ids = snapshot(stream.cache), list(stream.token_ids)
    grids = torch.tensor([[1, 4, 4], [1, 4, 4]])
    with pytest.raises(InputError):
        stream.feed([8, 9], torch.zeros(32, 1176), grids, points)
    with pytest.raises(InputError):
        stream.feed([])
    with pytest.raises(InputError):
        stream.feed([8, -1])
    assert snapshot(stream.cache) == before and stream.token_ids == ids
    assert len(stream.generate(2)) == 2


INSERTION = {
    "no image for the tokens": {"image_grid_thw": None, "pixel_values": None},
    "points": {"insertion_points": torch.tensor([[2], [3]])},
    "an image in two pieces": {"input_ids": torch.tensor([[5, 381, 381, 6, 381, 381], [5, 381, 381, 381, 381, 6]])},
    "the images' order": {
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 4]]),
        "pixel_values": torch.zeros(32, 1176),
    },
    "too many images": {"input_ids": torch.tensor([[5, 381, 381, 381, 381, 6], [5, 6, 7, 8, 9, 10]])},
    "an image on two rows": {"input_ids": torch.tensor([[5, 381, 381, 381, 381, 381], [381, 381, 381, 6, 7, 8]])},
}


@pytest.mark.parametrize("change", INSERTION.values(), ids=INSERTION)
def test_insertion(tiny, change: dict) -> None:
    model = tiny("tiny-qwen", fusion="insertion")
    call = {
        "input_ids": torch.tensor([[5, 381, 381, 381, 381, 6]] * 2),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "pixel_values": torch.zeros(32, 1176),
    }
    cache = model.new_cache()
    with torch.no_grad():
        model(**call, past_key_values=cache)
    before = snapshot(cache)
    with pytest.raises(InputError):
        model(**(call | change), past_key_values=cache)
    assert snapshot(cache) == before
