"""The check of a call's images: which row each belongs to, and its insertion point in that row's text.

Images of all rows are concatenated, ordered by row, as in Qwen2.5-VL. The CA fusions show by their insertion
points, a row of numbers for each prompt, which images are whose; with `insertion` the image tokens in the text do.
Points count a row's real tokens, so that whoever pads a batch, on either side, leaves them as they are:

    row 0    t0 t1 t2 t3 t4      points 1, 4      -> insertion_points [[1,  4],
    row 1    .. .. t0 t1 t2      point  1                              [1, -1]]
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from casa_engine.configuration import CasaConfig
from casa_engine.errors import InputError
from casa_engine.padding import pad_rows
from casa_engine.rope import image_token_counts
from casa_engine.tensor_checks import check_tensor

NO_IMAGE = -1
VIRTUAL_TOKENS = "virtual tokens (PEFT's prompt and prefix tuning) would move the text away from its images"


@dataclass(frozen=True)
class ImageInputs:
    """The new images of one call of B rows.

    Attributes:
        grids: int64 (I, 3) on the CPU. Temporal, height, width of each image in patches.
        counts: Image tokens of each image.
        points: For each row the insertion points of its images, ascending, counted in the call's real tokens of the
            row. With `insertion`: the index of each image's first token.
    """

    grids: Tensor
    counts: list[int]
    points: list[list[int]]

    @property
    def by_row(self) -> list[list[int]]:
        """The indexes of each row's images."""
        ends = list(itertools.accumulate(len(row) for row in self.points))
        return [list(range(end - len(row), end)) for row, end in zip(self.points, ends, strict=True)]

    @property
    def patches(self) -> list[int]:
        """Patches of each image in `pixel_values`."""
        return self.grids.prod(dim=-1).tolist()


def pad_insertion_points(rows: Sequence[Sequence[int]]) -> Tensor:
    """Pad the insertion points of B rows as the model takes them: int64 (B, M)."""
    return torch.from_numpy(pad_rows(rows, NO_IMAGE))


def check_images(
    config: CasaConfig,
    streams: list[list[int]],
    pixel_values: Tensor | None,
    image_embeds: Tensor | None,
    image_grid_thw: Tensor | None,
    insertion_points: Tensor | None,
    device: torch.device,
) -> ImageInputs:
    """Check the images of one call.

    Args:
        config: The model's configuration.
        streams: The call's real tokens of each row.
        pixel_values: (P, 1176), floating.
        image_embeds: (sum of N, C), floating. Instead of `pixel_values`.
        image_grid_thw: int (I, 3).
        insertion_points: int (B, M), padded with -1 after a row's points; (M,) for one row.
        device: Of the text.

    Returns:
        The images, none if none were given.

    Raises:
        InputError: Anything is of another shape, dtype or device, not finite, or does not fit together.
    """
    if (pixel_values is not None or image_embeds is not None) != (image_grid_thw is not None):
        raise InputError("pixel_values (or image_embeds) and image_grid_thw must be given together.")
    grids, counts = torch.zeros(0, 3, dtype=torch.long), []
    if image_grid_thw is not None:
        grids = _check_grids(config, image_grid_thw, device)
        counts = image_token_counts(grids, config.vision_config.spatial_merge_size)
        _check_content(config, grids, counts, pixel_values, image_embeds, device)
    if config.is_cross_attention:
        points = _check_points(streams, len(grids), insertion_points, device)
    elif insertion_points is None:
        points = _points_in_streams(config, streams, counts)
    else:
        raise InputError(
            "got insertion_points for a model of fusion 'insertion', whose images stand in input_ids; leave them out."
        )
    return ImageInputs(grids, counts, points)


def _check_grids(config: CasaConfig, grids: Tensor, device: torch.device) -> Tensor:
    check_tensor("image_grid_thw", grids, "int", ("I", 3), device, small=True)
    merge = config.vision_config.spatial_merge_size
    grids = grids.cpu().long()
    if not len(grids):
        raise InputError("image_grid_thw has no rows; leave it and pixel_values out where there is no image.")
    if (grids < 1).any() or (grids[:, 0] != 1).any() or (grids[:, 1:] % merge).any():
        raise InputError(
            f"image_grid_thw is {grids.tolist()}; expected (1, height, width) of each image in patches, both positive "
            f"multiples of {merge}. Pass video frames as images."
        )
    return grids


def _check_content(config, grids, counts, pixel_values, image_embeds, device) -> None:
    if pixel_values is not None and image_embeds is not None:
        raise InputError("got both pixel_values and image_embeds; they are the same images: pass one of them.")
    vision = config.vision_config
    patch_size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    name, tensor, length, width = "pixel_values", pixel_values, int(grids.prod(dim=-1).sum()), patch_size
    if pixel_values is None:
        name, tensor, length, width = "image_embeds", image_embeds, sum(counts), config.text_config.hidden_size
    check_tensor(name, tensor, "float", ("length", width), device)
    if len(tensor) != length:
        raise InputError(f"{name} has {len(tensor)} rows; image_grid_thw {grids.tolist()} needs {length}.")
    if not torch.isfinite(tensor).all():
        raise InputError(f"{name} has values that are NaN or infinite; check how the images were prepared.")


def _check_points(streams, num_images: int, points: Tensor | None, device: torch.device) -> list[list[int]]:
    num_rows = len(streams)
    if points is None:
        if num_images:
            raise InputError(
                f"{num_images} images with no insertion points; expected one for each image (CasaProcessor returns "
                "them)."
            )
        return [[] for _ in streams]
    if num_rows == 1 and isinstance(points, Tensor) and points.ndim == 1:
        points = points[None]
    check_tensor("insertion_points", points, "int", ("B", "M"), device, small=True)
    if len(points) != num_rows:
        raise InputError(
            f"insertion_points has shape {tuple(points.shape)}; expected ({num_rows}, M): for each row of input_ids "
            f"the points of its images, padded with {NO_IMAGE}."
        )
    rows = [_row_points(row, values, len(streams[row])) for row, values in enumerate(points.tolist())]
    if (num_points := sum(map(len, rows))) != num_images:
        raise InputError(
            f"{num_images} images with {num_points} insertion points {points.tolist()}; expected one for each image. "
            f"Rows with fewer images than others are padded with {NO_IMAGE}; transformers' pipeline pads with 0: give "
            "it prompts of equally many images in one batch."
        )
    return rows


def _row_points(row: int, values: list[int], num_tokens: int) -> list[int]:
    points = list(itertools.takewhile(lambda value: value != NO_IMAGE, values))
    padding = values[len(points) :]
    if any(value != NO_IMAGE for value in padding) or any(
        not low <= high for low, high in itertools.pairwise([0, *points, num_tokens])
    ):
        raise InputError(
            f"insertion points of row {row} are {values}; expected ascending numbers from 0 to {num_tokens}, the "
            f"row's real tokens in this call, then {NO_IMAGE} as padding."
        )
    return points


def _points_in_streams(config: CasaConfig, streams: list[list[int]], counts: list[int]) -> list[list[int]]:
    """Return where images are in streams with image tokens: each run of these must be a whole number of images."""
    left, rows = list(reversed(counts)), []
    for row, stream in enumerate(streams):
        points, index = [], 0
        while index < len(stream):
            if stream[index] != config.image_token_id:
                index += 1
                continue
            run = len(list(itertools.takewhile(lambda token: token == config.image_token_id, stream[index:])))
            if not left or left[-1] > run:
                raise InputError(
                    f"row {row} has {run} image tokens at its token {index}; "
                    + (f"its next image needs {left[-1]}" if left else "no image is left for them")
                    + ": pass each image with all its tokens in one call, ordered by row."
                )
            points.append(index)
            index += left.pop()
        rows.append(points)
    if left:
        raise InputError(
            f"{len(counts)} images, of which input_ids has image tokens for {len(counts) - len(left)}; expected each "
            "image with all its tokens in one call."
        )
    return rows
