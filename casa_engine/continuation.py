"""A grown conversation over a cache: what is new in it.

`generate` gets the whole conversation again, text and images, with the cache that has read its beginning. Each row's
text must begin with the text of its cached row, and its first images must be where the cached ones are; what follows
is new. Pixels of images already seen are not compared: nothing of them is kept.

Rows may be padded otherwise than before, since a tokenizer pads each batch anew:

    cached     .. a  b  c  d        new call      a  b  c  d  e  f   ->   .. e  f
               e  f  g  h  i                      .. e  f  g  h  i  j      .. .. j
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from casa_engine.cache import CasaCache
from casa_engine.call_inputs import CallInputs
from casa_engine.errors import InputError
from casa_engine.image_inputs import pad_insertion_points


@dataclass(frozen=True)
class Continuation:
    """The new part of a grown conversation.

    Attributes:
        input_ids, attention_mask: int64 (B, T'), padded on the left.
        points: For each row the insertion points of its new images, counted in its new tokens.
        images: Indexes of the new images among all given.
        num_hidden: For each row how many last cached tokens are padding that `generate` wrote after the row's end.
    """

    input_ids: Tensor
    attention_mask: Tensor
    points: list[list[int]]
    images: list[int]
    num_hidden: list[int]

    def apply(self, cache: CasaCache) -> None:
        """Hide what is padding in the cache."""
        for row, count in enumerate(self.num_hidden):
            cache.hide_last_tokens(row, count)


def find_continuation(cache: CasaCache, input_ids: Tensor, inputs: CallInputs, padding_ids: set[int]) -> Continuation:
    """Compare a whole conversation with what a cache has read. Change nothing.

    Args:
        cache: Not empty.
        input_ids: int64 (B, T). The whole conversation of each row.
        inputs: Its check, as of a first call.
        padding_ids: What `generate` writes behind the end of a row that ends before others.

    Returns:
        What is new.

    Raises:
        InputError: A row does not go on where its cached row ends.
    """
    if len(cache.key_positions) != len(input_ids):
        raise InputError(f"the cache has {len(cache.key_positions)} conversations; got {len(input_ids)} rows of ids.")
    new_ids, points, images, num_hidden = [], [], [], []
    for row, own_images in enumerate(inputs.images.by_row):
        ids, cached = input_ids[row][inputs.real[row]].tolist(), cache.row_ids(row)
        num_old = _shared_length(row, ids, cached, padding_ids)
        old_points = cache.seen_points[row] if cache.seen_points else []
        row_points = inputs.images.points[row]
        if row_points[: len(old_points)] != old_points or any(
            point < num_old for point in row_points[len(old_points) :]
        ):
            raise InputError(
                f"row {row} has images at {row_points}, its cached conversation of {num_old} tokens at {old_points}; "
                "expected these first and new images behind the cached text. Start with an empty cache."
            )
        new_ids.append(ids[num_old:])
        points.append([point - num_old for point in row_points[len(old_points) :]])
        images += own_images[len(old_points) :]
        num_hidden.append(len(cached) - num_old)
    longest = max(map(len, new_ids))
    padding = [longest - len(ids) for ids in new_ids]
    fill = int(input_ids[0, 0])  # any id of the vocabulary: it is masked
    return Continuation(
        torch.tensor([[fill] * count + ids for count, ids in zip(padding, new_ids, strict=True)]).to(input_ids.device),
        torch.tensor([[0] * count + [1] * (longest - count) for count in padding]).to(input_ids.device),
        points,
        images,
        num_hidden,
    )


def _shared_length(row: int, ids: list[int], cached: list[int], padding_ids: set[int]) -> int:
    """Return how many cached tokens the conversation begins with: all but what pads a row that ended early."""
    shared = next((i for i, (a, b) in enumerate(zip(ids, cached, strict=False)) if a != b), min(len(ids), len(cached)))
    if not padding_ids.issuperset(cached[shared:]):
        raise InputError(
            f"row {row} does not continue its cached conversation: from token {shared} on it has "
            f"{ids[shared : shared + 4]}, the cache {cached[shared : shared + 4]}. Pass the whole conversation, which "
            "begins with the cached text; or new tokens alone with an attention_mask for cached and new ones; or start "
            "with an empty cache."
        )
    if shared == len(ids):
        raise InputError(
            f"row {row} has nothing new: the cache has read all its {shared} tokens; generation needs one more."
        )
    return shared


def select_images(images: dict[str, Tensor], inputs: CallInputs, chosen: list[int]) -> dict[str, Tensor]:
    """Select some of a call's images, in this order, from `pixel_values` or `image_embeds` and `image_grid_thw`.

    Args:
        images: The call's arguments.
        inputs: Their check.
        chosen: Indexes of images; an image may come several times.

    Returns:
        The same arguments for the chosen images; none without any.
    """
    if not chosen:
        return {}
    selected = {"image_grid_thw": images["image_grid_thw"][chosen]}
    for name, sizes in (("pixel_values", inputs.images.patches), ("image_embeds", inputs.images.counts)):
        if images.get(name) is not None:
            parts = images[name].split(sizes)
            selected[name] = torch.cat([parts[image] for image in chosen])
    return selected


def add_insertion_points(images: dict[str, Tensor], points: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    """Add `insertion_points` (B, M) to a call's images, if there are any."""
    return images | {"insertion_points": pad_insertion_points(points).to(device)} if images else {}
