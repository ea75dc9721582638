"""`generate` on a grown conversation with its cache: the tokens and logits of a fresh run, or a refusal."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.errors import InputError
from casa_engine.presets import preset_config
from chats import picture, prepare, user
from snapshots import snapshot
from tiny_presets import TINY_PRESETS

POINTS = "insertion_points"
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
FIRST = [
    [user("What is", picture(56, 84), "this?")],
    [user("Hello")],
    [user("These", picture(61, 50), "and", picture(28, 28), "please")],
]
# What follows the model's answer, which stays as it was: its bytes need not be text.
LATER = [
    [user("and", picture(84, 56), "this?")],
    [user(picture(28, 56), "?")],
    [user("Thanks for all that you said about them")],
]
PRESETS = [(preset, fusion) for preset in TINY_PRESETS for fusion in ("ca", "ca_tv", "insertion")]


@pytest.fixture(scope="module", params=PRESETS, ids="-".join)
def parts(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("-".join(request.param))
    preset, fusion = request.param
    write_random_checkpoint(preset_config(preset, fusion=fusion), folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)


def items_of(processor, chats) -> list[dict]:
    return [dict(prepare(processor, chat)) for chat in chats]


def batch_of(items: list[dict]) -> dict[str, torch.Tensor]:
    """Rows padded on the left to the longest of them."""
    length, points = max(item["input_ids"].shape[1] for item in items), [[] for _ in items]
    ids, mask = (torch.zeros(len(items), length, dtype=torch.long) for _ in range(2))
    for row, item in enumerate(items):
        own = item["input_ids"][0]
        ids[row, length - len(own) :], mask[row, length - len(own) :] = own, 1
        if "insertion_points" in item:
            points[row] = item["insertion_points"][0].tolist()
    batch = {"input_ids": ids, "attention_mask": mask}
    for name in ("pixel_values", "image_grid_thw"):
        given = [item[name] for item in items if name in item]
        if given:
            batch[name] = torch.cat(given)
    if any(points):
        longest = max(map(len, points))
        batch["insertion_points"] = torch.tensor([row + [-1] * (longest - len(row)) for row in points])
    return batch


def grown(first: dict, answer: list[int], later: dict) -> dict:
    """The conversation after one more turn: what was said, and what is asked now."""
    ids = torch.cat([first["input_ids"], torch.tensor([answer], dtype=torch.long), later["input_ids"]], dim=1)
    item = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("pixel_values", "image_grid_thw"):
        given = [part[name] for part in (first, later) if name in part]
        if given:
            item[name] = torch.cat(given)
    before = first["input_ids"].shape[1] + len(answer)
    parts = [(part[POINTS], offset) for part, offset in ((first, 0), (later, before)) if POINTS in part]
    points = [each + offset for each, offset in parts]
    if points:
        item["insertion_points"] = torch.cat(points, dim=1)
    return item


def compare(model, inputs: dict, cache, **options) -> list[list[int]]:
    """Generate over the cache and afresh; return the new tokens, which are the same."""
    over = model.generate(**inputs, past_key_values=cache, **OPTIONS, **options)
    fresh = model.generate(**inputs, **OPTIONS, **options)
    torch.testing.assert_close(torch.stack(over.logits), torch.stack(fresh.logits), rtol=1e-4, atol=1e-4)
    assert torch.equal(over.sequences, fresh.sequences)
    return over.sequences[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("rows", [[0], [0, 1, 2], [2, 1]])
def test_three_turns(parts, rows: list[int]) -> None:
    """Rows of unequal length, whose padding is another in each turn."""
    model, processor = parts
    cache = model.new_cache()
    items = items_of(processor, [FIRST[row] for row in rows])
    for turn in range(3):
        new = compare(model, batch_of(items), cache, eos_token_id=None, pad_token_id=0)
        later = items_of(processor, [LATER[(row + turn) % 3] for row in rows])
        items = [grown(*parts) for parts in zip(items, new, later, strict=True)]


def test_a_row_that_ends_before_the_others(parts) -> None:
    """What `generate` writes behind its end is no part of the conversation."""
    model, processor = parts
    items = items_of(processor, FIRST)
    free = model.generate(**batch_of(items), **OPTIONS, eos_token_id=None, pad_token_id=0).sequences[:, -5:]
    said = [set(row) for row in free.tolist()]
    stop = next(token for token in free[:, :3].flatten().tolist() if not all(token in row for row in said))
    cache = model.new_cache()
    new = compare(model, batch_of(items), cache, eos_token_id=stop, pad_token_id=0)
    assert any(0 in row for row in new), "no row ended early: the test would show nothing"
    answers = [row[: row.index(stop) + 1] if stop in row else row for row in new]
    items = [grown(*each) for each in zip(items, answers, items_of(processor, LATER), strict=True)]
    compare(model, batch_of(items), cache, eos_token_id=None, pad_token_id=0)


def test_new_tokens_alone(parts) -> None:
    """With a mask that covers the cached tokens too, as transformers has it."""
    model, processor = parts
    first, later = items_of(processor, [FIRST[0], LATER[0]])
    cache = model.new_cache()
    new = compare(model, first, cache, eos_token_id=None, pad_token_id=0)[0]
    whole = grown(first, new, later)
    ids = whole["input_ids"][:, cache.get_seq_length() :]
    alone = later | {"input_ids": ids, "attention_mask": whole["attention_mask"]}
    if "insertion_points" in later:
        alone["insertion_points"] = later["insertion_points"] + 1  # the last answer's last token was not fed yet
    over = model.generate(**alone, past_key_values=cache, **OPTIONS, eos_token_id=None, pad_token_id=0)
    fresh = model.generate(**whole, **OPTIONS, eos_token_id=None, pad_token_id=0)
    torch.testing.assert_close(torch.stack(over.logits), torch.stack(fresh.logits), rtol=1e-4, atol=1e-4)


def test_beams_over_a_repeated_cache(parts) -> None:
    model, processor = parts
    first, later = items_of(processor, [FIRST[0], LATER[0]])
    cache = model.new_cache()
    new = compare(model, first, cache, eos_token_id=None, pad_token_id=0)[0]
    cache.batch_repeat_interleave(3)
    whole = grown(first, new, later)
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    over = model.generate(**whole, past_key_values=cache, **options)
    assert torch.equal(over, model.generate(**whole, **options))


def test_what_does_not_continue_is_refused(parts) -> None:
    """Each time the cache stays as it was: the right continuation is still answered."""
    model, processor = parts
    first, later = items_of(processor, [FIRST[0], LATER[0]])
    cache = model.new_cache()
    new = compare(model, first, cache, eos_token_id=None, pad_token_id=0)[0]
    whole = grown(first, new, later)
    before = snapshot(cache)

    other = {**whole, "input_ids": whole["input_ids"].clone()}
    other["input_ids"][0, 1] += 1
    cases = [
        (other, "does not continue"),
        ({"input_ids": torch.tensor([[5, 6]])}, "does not continue"),
        (
            {**first, "input_ids": first["input_ids"][:, :-1], "attention_mask": first["attention_mask"][:, :-1]},
            "does not continue",
        ),
        (batch_of([whole, whole]), "1 conversations; got 2 rows"),
    ]
    if "insertion_points" in whole:
        points = whole["insertion_points"]
        cases += [
            ({**whole, "insertion_points": points + torch.tensor([[1, 0]])}, "has images at"),
            ({**whole, "insertion_points": torch.stack([points[:, 0], points[:, 0]], dim=1)}, "has images at"),
            ({name: whole[name] for name in ("input_ids", "attention_mask")}, "has images at"),
            ({**whole, "insertion_points": points + 1000}, "expected ascending numbers"),
        ]
    seen = {**first, "input_ids": torch.tensor([cache.row_ids(0)])}
    cases.append(({**seen, "attention_mask": torch.ones_like(seen["input_ids"])}, "nothing new"))
    for inputs, words in cases:
        with pytest.raises(InputError, match=words):
            model.generate(**inputs, past_key_values=cache, **OPTIONS)
        assert snapshot(cache) == before
    compare(model, whole, copy.deepcopy(cache), eos_token_id=None, pad_token_id=0)
