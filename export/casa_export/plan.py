"""The graphs' inputs for windows and positions, in NumPy, from the one window rule in `casa_engine.windows`."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from casa_engine.configuration import CasaConfig
from casa_engine.windows import check_insertion_points, last_window, plan_windows

PADDING = -1
# A padded token's window: no image starts here, not even the padding among images.
NO_WINDOW = -2


def vision_inputs(config: CasaConfig, grid: np.ndarray) -> dict[str, np.ndarray]:
    """Return positions and attention windows of one frame, from transformers' own functions.

    Args:
        config: Gives patch, merge and window size.
        grid: int64 (3,): 1, height, width in patches.

    Returns:
        patch_positions (P, 2), vision_windows (W, S) and vision_slots (N,), all int64; see `VisionGraph`.
    """
    vision, grids = config.vision_config, torch.from_numpy(np.asarray(grid, dtype=np.int64))[None]
    index, bounds = get_vision_window_index(grids, vision.spatial_merge_size, vision.window_size, vision.patch_size)
    bounds = bounds.numpy() // vision.spatial_merge_size**2
    lengths = np.diff(bounds)
    windows = np.full((len(lengths), lengths.max()), PADDING, dtype=np.int64)
    slots = np.empty(len(index), dtype=np.int64)
    for row, tokens in enumerate(np.split(index.numpy(), bounds[1:-1])):
        windows[row, : len(tokens)] = tokens
        slots[tokens] = row * windows.shape[1] + np.arange(len(tokens))
    positions = get_vision_position_ids(grids, vision.spatial_merge_size)
    return {"patch_positions": positions.numpy(), "vision_windows": windows, "vision_slots": slots}


@dataclass(frozen=True)
class RowPlan:
    """Windows of one row's new tokens.

    Attributes:
        starts: int64 (T,). Start of each token's window, `NO_WINDOW` for padding.
        seen: Indexes, first and one past the last, of the images that some new token sees (equal if none).
        kept: The same for the images that the row's next token will see.
        first_start: Start of the first real token's window, or of the next token's where there is none.
    """

    starts: np.ndarray
    seen: tuple[int, int]
    kept: tuple[int, int]
    first_start: int


def plan_row(positions: np.ndarray, num_seen: int, points: np.ndarray) -> RowPlan:
    """Plan one row of a call.

    Args:
        positions: int64 (T,). Text-stream index of each new token, -1 for padding.
        num_seen: Real text tokens of the row before this call.
        points: int64 (M,). Insertion points of the images kept so far, then of new ones, as text-stream indexes.

    Returns:
        The plan.
    """
    check_insertion_points(points)
    real = positions >= 0
    plan = plan_windows(positions[real], points)
    starts = np.full(len(positions), NO_WINDOW, dtype=np.int64)
    starts[real] = plan.starts
    with_image = plan.has_image
    seen = (0, 0)
    if with_image.any():
        seen = int(plan.first_images[with_image].min()), int(plan.end_images[with_image].max())
    next_start, *kept = last_window(num_seen + int(real.sum()), points)
    first_start = int(plan.starts[0]) if len(plan.starts) else next_start
    return RowPlan(starts, seen, (kept[0], kept[1]), first_start)


def cut_columns(num_tokens: int, max_tokens: int, points: np.ndarray) -> list[slice]:
    """Split a call's columns into pieces for the decoder.

    Args:
        num_tokens: Columns T of the call.
        max_tokens: Most columns of a piece.
        points: int. Columns to cut at, so that no piece sees more than one window.

    Returns:
        Consecutive slices that cover the columns.
    """
    bounds = sorted({0, num_tokens, *points.tolist()})
    starts = [start for low, high in itertools.pairwise(bounds) for start in range(low, high, max_tokens)]
    return [slice(low, high) for low, high in itertools.pairwise([*starts, num_tokens])]
