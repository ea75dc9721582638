"""Calls that every model must refuse with InputError, as changes of a good call of two rows over a cache.

`good_call` has two prompts of unequal length, one padded on the left, with two images and one. Each change is a
name and a function from the good call's arguments to bad ones; `words_of` says what its error must be about.
"""

from collections.abc import Callable

import torch

Call = dict[str, object]
VOCAB_SIZE = 384
GRIDS = [[1, 4, 4], [1, 4, 6], [1, 2, 10]]


def good_call(seed: int = 0) -> Call:
    """Two rows of 7 and 5 tokens; the first with images before its tokens 2 and 5, the second behind its last."""
    generator = torch.Generator().manual_seed(seed)
    grids = torch.tensor(GRIDS)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    return {
        "input_ids": torch.randint(3, 300, (2, 7), generator=generator),
        "attention_mask": mask,
        "pixel_values": torch.randn(int(grids.prod(-1).sum()), 1176, generator=generator),
        "image_grid_thw": grids,
        "insertion_points": torch.tensor([[2, 5], [5, -1]]),
    }


def _set(name: str, value: object) -> Callable[[Call], Call]:
    return lambda call: call | {name: value}


def _map(name: str, change: Callable[[torch.Tensor], object]) -> Callable[[Call], Call]:
    return lambda call: call | {name: change(call[name])}


def _without(*names: str) -> Callable[[Call], Call]:
    return lambda call: {name: value for name, value in call.items() if name not in names}


def _put(name: str, index: tuple[int, ...], value: float) -> Callable[[Call], Call]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed[index] = value
        return changed

    return _map(name, change)


POINTS = {
    "beyond the row": [[2, 8], [5, -1]],
    "999": [[2, 999], [5, -1]],
    "beyond the row's real tokens": [[2, 5], [6, -1]],
    "descending": [[5, 2], [5, -1]],
    "negative": [[2, 5], [-2, -1]],
    "very negative": [[-(2**40), 5], [5, -1]],
    "padding before a point": [[2, 5], [-1, 5]],
    "padding between points": [[2, -1, 5], [5, -1, -1]],
    "too few": [[2, -1], [5, -1]],
    "too many": [[2, 5], [5, 5]],
    "padded with 0": [[2, 5], [5, 0]],
    "padded with 0 before": [[2, 5], [0, 5]],
    "none at all": [[-1, -1], [-1, -1]],
    "no column": [[], []],
    "a row less": [[2, 5]],
    "a row more": [[2, 5], [5, -1], [-1, -1]],
    "flat": [2, 5, 5],
    "one number": 2,
    "three axes": [[[2, 5], [5, -1]]],
}

BAD_CALLS: dict[str, Callable[[Call], Call]] = {
    "ids: a list": _set("input_ids", [[5, 6, 7, 8, 9, 10, 11]] * 2),
    "ids: None": _set("input_ids", None),
    "ids: floating": _map("input_ids", torch.Tensor.float),
    "ids: bool": _map("input_ids", torch.Tensor.bool),
    "ids: one axis": _map("input_ids", lambda ids: ids[0]),
    "ids: three axes": _map("input_ids", lambda ids: ids[:, None]),
    "ids: no row": _map("input_ids", lambda ids: ids[:0]),
    "ids: no column": _map("input_ids", lambda ids: ids[:, :0]),
    "ids: -1": _put("input_ids", (0, 3), -1),
    "ids: -100": _put("input_ids", (1, 6), -100),
    "ids: the vocabulary's size": _put("input_ids", (1, 4), VOCAB_SIZE),
    "ids: huge": _put("input_ids", (0, 0), 2**40),
    "ids: another device": _map("input_ids", lambda ids: ids.to("meta")),
    "ids: more rows than the cache": _map("input_ids", lambda ids: torch.cat([ids, ids])[:3]),
    "mask: a list": _set("attention_mask", [[1] * 7] * 2),
    "mask: floating": _map("attention_mask", torch.Tensor.float),
    "mask: four axes": _map("attention_mask", lambda mask: mask[:, None, None]),
    "mask: a row": _map("attention_mask", lambda mask: mask[0]),
    "mask: too short": _map("attention_mask", lambda mask: mask[:, 1:]),
    "mask: too long": _map("attention_mask", lambda mask: torch.ones(2, 40, dtype=torch.long)),
    "mask: 2": _put("attention_mask", (0, 0), 2),
    "mask: -1": _put("attention_mask", (1, 0), -1),
    "mask: another device": _map("attention_mask", lambda mask: mask.to("meta")),
    "pixels: a list": _map("pixel_values", torch.Tensor.tolist),
    "pixels: integers": _map("pixel_values", torch.Tensor.long),
    "pixels: complex": _map("pixel_values", lambda pixels: pixels.to(torch.complex64)),
    "pixels: NaN": _put("pixel_values", (3, 7), float("nan")),
    "pixels: infinite": _put("pixel_values", (40, 1175), float("-inf")),
    "pixels: a patch less": _map("pixel_values", lambda pixels: pixels[1:]),
    "pixels: a patch more": _map("pixel_values", lambda pixels: torch.cat([pixels, pixels[:1]])),
    "pixels: other patches": _map("pixel_values", lambda pixels: pixels[:, :1000]),
    "pixels: stacked": _map("pixel_values", lambda pixels: pixels[None]),
    "pixels: of an image": _set("pixel_values", torch.zeros(1, 3, 56, 56)),
    "pixels: none": _map("pixel_values", lambda pixels: pixels[:0]),
    "pixels: another device": _map("pixel_values", lambda pixels: pixels.to("meta")),
    "pixels without grids": _without("image_grid_thw"),
    "grids without pixels": _without("pixel_values"),
    "grids: a list": _set("image_grid_thw", GRIDS),
    "grids: floating": _map("image_grid_thw", torch.Tensor.float),
    "grids: two columns": _map("image_grid_thw", lambda grids: grids[:, 1:]),
    "grids: one row": _map("image_grid_thw", lambda grids: grids[0]),
    "grids: stacked": _map("image_grid_thw", lambda grids: grids[None]),
    "grids: one image less": _map("image_grid_thw", lambda grids: grids[:-1]),
    "grids: none": _map("image_grid_thw", lambda grids: grids[:0]),
    "grids: 0": _put("image_grid_thw", (0, 1), 0),
    "grids: negative": lambda call: call | {"image_grid_thw": torch.tensor([[1, -4, -4], *GRIDS[1:]])},
    "grids: two frames": lambda call: call | {"image_grid_thw": torch.tensor([[2, 2, 4], *GRIDS[1:]])},
    "grids: half an image token": lambda call: call | {"image_grid_thw": torch.tensor([[1, 1, 16], *GRIDS[1:]])},
    "grids: another device": _map("image_grid_thw", lambda grids: grids.to("meta")),
    "points: a list": _set("insertion_points", [[2, 5], [5, -1]]),
    "points: floating": _map("insertion_points", torch.Tensor.float),
    "points: bool": _map("insertion_points", torch.Tensor.bool),
    "points: another device": _map("insertion_points", lambda points: points.to("meta")),
    "points: left out": _without("insertion_points"),
    "points without images": _without("pixel_values", "image_grid_thw"),
    "logits_to_keep: negative": _set("logits_to_keep", -1),
    "logits_to_keep: a tensor": _set("logits_to_keep", torch.tensor([1])),
    "logits_to_keep: bool": _set("logits_to_keep", True),
    "cache: a list": _set("past_key_values", []),
} | {f"points: {name}": _set("insertion_points", torch.tensor(points)) for name, points in POINTS.items()}
# By the beginning of a name, the longest first.
WORDS = {
    "ids: more rows": "the cache has 2 conversations; got 3 rows",
    "pixels without grids": "must be given together",
    "grids without pixels": "must be given together",
    "ids": "input_ids",
    "mask": "attention_mask",
    "pixels": "pixel_values",
    "grids": "image_grid_thw",
    "points": "insertion[_ ]points",
    "logits_to_keep": "logits_to_keep",
    "cache": "the cache is a list; expected ",
}


def words_of(name: str) -> str:
    """Return a pattern for the error of a bad call: it names the argument that is wrong."""
    return next(words for start, words in WORDS.items() if name.startswith(start))
