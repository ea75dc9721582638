"""The exported model refuses what the eager model refuses, through the same check, and goes on as if nothing was."""

import pytest
import torch

from bad_calls import BAD_CALLS, good_call, words_of
from casa_engine.errors import InputError
from snapshots import snapshot


@pytest.fixture
def conversation(exported):
    cache = exported.new_cache()
    exported(**good_call(1), past_key_values=cache)
    return exported, cache


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(conversation, name: str) -> None:
    model, cache = conversation
    before = snapshot(cache)
    with pytest.raises(InputError, match=words_of(name)):
        model(**BAD_CALLS[name]({"past_key_values": cache} | good_call()))
    assert snapshot(cache) == before


@pytest.mark.parametrize("name", [name for name in BAD_CALLS if not name.startswith(("logits", "cache", "ids: more"))])
def test_generate(exported, name: str) -> None:
    with pytest.raises(InputError, match=words_of(name)):
        exported.generate(**BAD_CALLS[name](good_call()), max_new_tokens=2)


def frames(count: int, height: int, point: int) -> dict:
    grids = torch.tensor([[1, height, 16]] * count)
    return {
        "pixel_values": torch.randn(int(grids.prod(-1).sum()), 1176),
        "image_grid_thw": grids,
        "insertion_points": torch.tensor([[point] * count]),
    }


def test_limits_are_known_before_the_conversation_changes(exported) -> None:
    """Text, an image, a window over two calls: refused, and the conversation goes on as one that was never asked."""
    caches = [exported.new_cache(), exported.new_cache()]
    ids = torch.tensor([[5, 6, 7]])
    torch.manual_seed(0)
    first = frames(1, 16, 3)
    for cache in caches:
        exported(ids, **first, past_key_values=cache)  # its 64 image tokens belong to the next token's window
    before = snapshot(caches[0])
    for bad in (frames(2, 16, 0), frames(3, 12, 2), frames(1, 20, 1)):
        with pytest.raises(InputError, match="image tokens; these graphs take up to"):
            exported(ids, **bad, past_key_values=caches[0])
    with pytest.raises(InputError, match="text tokens; these graphs take up to"):
        exported(torch.full((1, 158), 5), past_key_values=caches[0])
    assert snapshot(caches[0]) == before
    after, clean = (exported(ids, past_key_values=cache).logits for cache in caches)
    assert torch.equal(after, clean)


def test_a_graph_that_fails_on_its_way(conversation, monkeypatch) -> None:
    """The third piece of a long call: the pieces before it are undone too."""
    model, cache = conversation
    before, runs, original = snapshot(cache), [], model.backend.run

    def run(graph, *arguments):
        runs.append(graph)
        if runs.count("decoder") == 3:
            raise MemoryError("no memory")
        return original(graph, *arguments)

    ids = torch.full((2, 120), 5)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(model.backend, "run", run)
        model(ids, past_key_values=cache)
    assert snapshot(cache) == before
    model(ids, past_key_values=cache)


def test_rows_padded_on_the_right_are_answered_as_on_the_left(exported) -> None:
    call = good_call()
    left = exported.generate(**call, max_new_tokens=6, eos_token_id=[])[:, 7:]
    turned = {"input_ids": call["input_ids"].clone(), "attention_mask": call["attention_mask"].flip(1)}
    turned["input_ids"][1] = call["input_ids"][1].roll(-2)
    assert torch.equal(exported.generate(**(call | turned), max_new_tokens=6, eos_token_id=[])[:, 7:], left)
