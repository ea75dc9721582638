"""The window plan of a padded batch, as the masks and positions that eager attention takes.

`windows.py` plans one row; here the rows of one forward call are put together with what a cache kept of their last
windows. Positions are indexes in each row's own text stream; -1 is padding.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from casa_engine.cache import CasaCache
from casa_engine.call_inputs import CallInputs
from casa_engine.configuration import CasaConfig
from casa_engine.padding import pad_rows
from casa_engine.rope import image_positions
from casa_engine.windows import check_insertion_points, last_window, plan_windows


@dataclass(frozen=True)
class WindowBatch:
    """The windows of one forward call of B rows of T tokens, as CA reads them.

    Attributes:
        relative: int64 (B, T). Position of each token relative to the start of its window.
        image_mask: bool (B, T, Nw + N). Which image tokens (kept ones, then new ones) each token sees.
        text_mask: bool (B, T, S). `ca_tv`: which text tokens each token sees through CA.
        gather: int64 (B, N). For each row, indexes of its new image tokens in the vision output; -1 for padding.
        image_rope: int64 (3, B, N). Rotary positions of the new image tokens.
        kept: int64 (B, Nw'). Which of the Nw + N image tokens belong to the last window; None if nothing changes.
        kept_images: int64 (B, Nw'). Image of each kept token within the last window.
        kept_points: For each row, the insertion points of the images of its last window.
    """

    relative: Tensor
    image_mask: Tensor
    text_mask: Tensor
    gather: Tensor
    image_rope: Tensor
    kept: Tensor | None
    kept_images: Tensor | None
    kept_points: list[list[int]]


def _pad(rows: list[np.ndarray], fill: int, device: torch.device) -> Tensor:
    return torch.from_numpy(pad_rows(rows, fill)).to(device)


def build_window_batch(
    config: CasaConfig, inputs: CallInputs, key_positions: Tensor, cache: CasaCache | None
) -> WindowBatch:
    """Plan the windows of one forward call.

    Args:
        config: The model's configuration.
        inputs: The call's checked inputs.
        key_positions: int64 (B, S). Text-stream index of all cached tokens and these, -1 for padding.
        cache: What the rows kept; None for a first call.

    Returns:
        Masks and positions.
    """
    positions, images = inputs.positions, inputs.images
    device = positions.device
    offsets = np.concatenate(([0], np.cumsum(images.counts))).astype(np.int64)
    token_positions, num_real = positions.cpu().numpy(), inputs.real.sum(dim=1).tolist()

    relative, firsts, ends, starts = [], [], [], []
    gather, ropes, token_images, kept, kept_images, kept_points = [], [], [], [], [], []
    num_kept = 0 if cache is None or cache.token_images is None else cache.token_images.shape[1]
    for row, own in enumerate(images.by_row):
        num_seen = inputs.num_seen[row]
        old_points = [] if cache is None or cache.insertion_points is None else cache.insertion_points[row]
        new_points = [point + num_seen for point in images.points[row]]
        row_points = np.array([*old_points, *new_points], dtype=np.int64)
        check_insertion_points(row_points)

        plan = plan_windows(token_positions[row].clip(min=0), row_points)
        relative.append(token_positions[row].clip(min=0) - plan.starts)
        starts.append(plan.starts)
        firsts.append(plan.first_images)
        ends.append(plan.end_images)

        old_images = cache.token_images[row].cpu().numpy() if num_kept else np.zeros(0, np.int64)
        new_images = np.repeat(np.arange(len(own)) + len(old_points), [images.counts[image] for image in own])
        token_images.append((old_images, new_images))
        gather.append(np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in own] or [np.zeros(0, np.int64)]))
        ropes.append(
            torch.cat([image_positions(images.grids[i], config) for i in own], dim=1).numpy()
            if own
            else np.zeros((3, 0), np.int64)
        )
        _, first, end = last_window(num_seen + num_real[row], row_points)
        chosen_old = np.flatnonzero((old_images >= first) & (old_images < end))
        chosen_new = np.flatnonzero((new_images >= first) & (new_images < end))
        kept.append(np.concatenate([chosen_old, chosen_new + num_kept]))
        kept_images.append(np.concatenate([old_images[chosen_old], new_images[chosen_new]]) - first)
        kept_points.append(row_points[first:end].tolist())

    new_tokens = _pad([new for _, new in token_images], -1, device)
    all_images = torch.cat([_pad([old for old, _ in token_images], -1, device), new_tokens], dim=1)[:, None]
    real = inputs.real[..., None]
    first, end, start = (torch.from_numpy(np.stack(each)).to(device)[..., None] for each in (firsts, ends, starts))
    keys = key_positions[:, None]
    return WindowBatch(
        relative=torch.from_numpy(np.stack(relative)).to(device),
        image_mask=real & (all_images >= first) & (all_images < end),
        text_mask=real & (keys >= start) & (keys <= positions[..., None]),
        gather=_pad(gather, -1, device),
        image_rope=torch.stack([_pad([rope[axis] for rope in ropes], 0, device) for axis in range(3)]),
        kept=_pad(kept, -1, device) if images.counts else None,
        kept_images=_pad(kept_images, -1, device) if images.counts else None,
        kept_points=kept_points,
    )
