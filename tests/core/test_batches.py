"""Batches that others put together: transformers' pipeline, its collators, torch.cat; each row as it is alone."""

import copy

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    DataCollatorWithPadding,
    default_data_collator,
    pipeline,
)

from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.errors import InputError
from casa_engine.presets import preset_config
from chats import picture, prepare, user

GREEDY = {"max_new_tokens": 6, "do_sample": False}
# Other images, other lengths of text: padding and insertion points differ from row to row.
CHATS = [
    [user(picture(56, 84), "What is this?")],
    [user("Look", picture(84, 56))],
    [user("And now, at the end of a longer question, this one:", picture(61, 50), "?")],
]


@pytest.fixture(scope="module", params=["ca", "ca_tv", "insertion"])
def parts(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_random_checkpoint(preset_config("tiny-qwen", fusion=request.param), folder)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


# Where images have insertion points.
with_points = pytest.mark.parametrize("parts", ["ca", "ca_tv"], indirect=True)


def make_pipeline(model, processor):
    """As `pipeline("image-text-to-text", model=folder)` makes it, of parts that are loaded already."""
    return pipeline(
        "image-text-to-text",
        model=model,
        processor=processor,
        tokenizer=copy.deepcopy(processor.tokenizer),
        image_processor=processor.image_processor,
        device="cpu",
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [2, 3])
def test_pipeline(parts, batch_size: int, side: str) -> None:
    model, processor = parts
    pipe = make_pipeline(model, processor)
    pipe.tokenizer.padding_side = side
    options = {"generate_kwargs": GREEDY, "return_tensors": True}
    lengths = [prepare(processor, chat)["input_ids"].shape[1] for chat in CHATS]
    alone = [pipe(text=chat, **options)[0]["generated_token_ids"] for chat in CHATS]
    together = pipe(text=CHATS, batch_size=batch_size, **options)
    for row, (ids, length) in enumerate(zip(alone, lengths, strict=True)):
        first = row // batch_size * batch_size
        new = together[row][0]["generated_token_ids"][max(lengths[first : first + batch_size]) :]
        assert new[: len(ids) - length].tolist() == ids[length:].tolist()


@with_points
def test_pipeline_with_unequal_numbers_of_images_is_refused(parts) -> None:
    """transformers' pipeline fills with 0, which says an image before the first token."""
    model, processor = parts
    pipe = make_pipeline(model, processor)
    chats = [CHATS[0], [user(picture(28, 28), picture(28, 56), "Both?")]]
    with pytest.raises(InputError, match=r"3 images with 4 insertion points.*pads with 0"):
        pipe(text=chats, batch_size=2, max_new_tokens=2)


def logits_of(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def collated(items: list[dict], side: str) -> dict[str, torch.Tensor]:
    """What a careful collator makes of several prompts: text padded on one side, the rest behind each other."""
    batch = {
        name: pad_sequence([item[name][0] for item in items], batch_first=True, padding_side=side)
        for name in ("input_ids", "attention_mask")
    }
    for name in ("pixel_values", "image_grid_thw"):
        batch[name] = torch.cat([item[name] for item in items])
    if "insertion_points" in items[0]:
        points = [item["insertion_points"][0] for item in items]
        batch["insertion_points"] = pad_sequence(points, batch_first=True, padding_value=-1)
    return batch


@pytest.mark.parametrize("side", ["left", "right"])
def test_own_collator_with_labels(parts, side: str) -> None:
    """Two images, one, one: logits and loss of the rows together are those of the rows alone."""
    model, processor = parts
    chats = [[user(picture(28, 28), "and", picture(28, 56), "?")], CHATS[0], CHATS[2]]
    items = [dict(prepare(processor, chat)) for chat in chats]
    batch = collated(items, side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        together = model(**batch, labels=labels)
        alone = [model(**item, labels=item["input_ids"]) for item in items]
    for row, one in enumerate(alone):
        real = batch["attention_mask"][row] > 0
        torch.testing.assert_close(together.logits[row, real], one.logits[0], rtol=1e-4, atol=2e-5)
    # The first token of a row padded on the left is learned from padding: a batch counts it, a row alone does not.
    learned = torch.tensor([item["input_ids"].shape[1] - 1 for item in items])
    if side == "right":
        expected = sum(one.loss * count for one, count in zip(alone, learned, strict=True)) / learned.sum()
        torch.testing.assert_close(together.loss, expected, rtol=1e-4, atol=2e-5)
    tokens = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    for row, item in enumerate(items):
        one = model.generate(**item, **GREEDY)[0, item["input_ids"].shape[1] :]
        assert tokens[row, : len(one)].tolist() == one.tolist()


def test_default_data_collator(parts) -> None:
    """It stacks: without the first axis that CasaProcessor gives it is the right batch, with it a refused one."""
    model, processor = parts
    chat = CHATS[0]
    other = [user(picture(84, 56), "What is that?")]  # the same sizes
    items = [dict(prepare(processor, each)) for each in (chat, other)]
    assert items[0]["input_ids"].shape == items[1]["input_ids"].shape
    with pytest.raises(InputError, match=r"input_ids has shape \(2, 1, .*torch.cat"):
        logits_of(model, default_data_collator(items))
    features = [
        {name: value if name in ("pixel_values", "image_grid_thw") else value[0] for name, value in item.items()}
        for item in items
    ]
    stacked = default_data_collator(features)
    with pytest.raises(InputError, match=r"image_grid_thw has shape \(2, 1, 3\).*torch.cat"):
        logits_of(model, stacked)
    flat = stacked | {name: stacked[name].flatten(0, 1) for name in ("pixel_values", "image_grid_thw")}
    together = logits_of(model, flat)
    for row, item in enumerate(items):
        torch.testing.assert_close(together[row], logits_of(model, item)[0], rtol=1e-4, atol=2e-5)


def test_data_collator_with_padding(parts) -> None:
    """Text and points come out right whichever side it pads; images are put behind each other by the caller."""
    model, processor = parts
    items = [dict(prepare(processor, chat)) for chat in CHATS]
    names = [name for name in items[0] if name not in ("pixel_values", "image_grid_thw")]
    batch = dict(
        DataCollatorWithPadding(processor.tokenizer)(
            [{name: item[name][0].tolist() for name in names} for item in items]
        )
    )
    for name in ("pixel_values", "image_grid_thw"):
        batch[name] = torch.cat([item[name] for item in items])
    together = logits_of(model, batch)
    for row, item in enumerate(items):
        real = batch["attention_mask"][row] > 0
        torch.testing.assert_close(together[row, real], logits_of(model, item)[0], rtol=1e-4, atol=2e-5)


@with_points
def test_flat_points_belong_to_one_row(parts) -> None:
    model, processor = parts
    one = dict(prepare(processor, CHATS[0]))
    flat = one | {"insertion_points": one["insertion_points"][0]}
    assert torch.equal(logits_of(model, flat), logits_of(model, one))
    two = collated([dict(prepare(processor, chat)) for chat in CHATS[:2]], "left")
    with pytest.raises(InputError, match=r"insertion_points has shape \(2,\); expected \(B, M\)"):
        logits_of(model, two | {"insertion_points": two["insertion_points"][:, 0]})
