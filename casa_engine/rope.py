"""Rotary positions: of image keys in CA_t+v, and of a stream with image tokens in it (insertion).

CA_t+v rotates by positions *relative to the window's start*: text token p of a window that starts at K by p - K, an
image by 0 (temporal) and, for `image_rope` "grid", its row and column. Rotary attention depends on differences only,
so this equals the paper's absolute positions (text p, image frozen at K), and makes an image's keys independent of
its insertion point: they can be cached once and shared.
"""

import itertools

import torch
from torch import Tensor

from casa_engine.configuration import CasaConfig
from casa_engine.errors import InputError


def image_token_counts(grids: Tensor, merge_size: int) -> list[int]:
    """Return the number of image tokens of each image; `grids` is int64 (I, 3): temporal, height, width in patches."""
    return (grids.prod(dim=-1) // merge_size**2).tolist()


def image_positions(grid: Tensor, config: CasaConfig) -> Tensor:
    """Return the rotary positions of one image's tokens, relative to the start of its window.

    Args:
        grid: int64 (3,): temporal, height, width of the image in patches.
        config: Gives `image_rope`, `image_position_offset` and the merge size.

    Returns:
        int64 (3, N): temporal, height and width coordinate of each image token.
    """
    merge = config.vision_config.spatial_merge_size
    height, width = int(grid[1]) // merge, int(grid[2]) // merge
    positions = torch.full((3, height * width), config.image_position_offset, dtype=torch.long)
    if config.image_rope == "grid":
        positions[1] += torch.arange(height).repeat_interleave(width)
        positions[2] += torch.arange(width).repeat(height)
    return positions


def rotates_images(config: CasaConfig) -> bool:
    """Return whether `image_positions` rotates keys: not in `ca`, and not where all are 0."""
    is_at_zero = config.image_rope == "frozen" and config.image_position_offset == 0
    return config.sees_window_text and not is_at_zero


def rotary_tables(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines of the half-split rotary embedding, for positions on one axis.

    Args:
        positions: int (..., T).
        inv_freq: float32 (D/2,).

    Returns:
        Two float32 tensors (..., T, D).
    """
    return _tables(positions[..., None].float() * inv_freq)


def axes_rotary_tables(positions: Tensor, inv_freq: Tensor, mrope_section: list[int] | None) -> tuple[Tensor, Tensor]:
    """Compute `rotary_tables` for positions on three axes.

    Args:
        positions: int (3, ..., T): temporal, height, width.
        inv_freq: float32 (D/2,).
        mrope_section: How many of the D/2 frequencies turn with each axis; None: all with the temporal one.

    Returns:
        Two float32 tensors (..., T, D).
    """
    if mrope_section is None:
        return rotary_tables(positions[0], inv_freq)
    parts = (positions[..., None].float() * inv_freq).split(mrope_section, dim=-1)
    return _tables(torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1))


def _tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (..., T, D) by tables that broadcast to it, in float32, and return x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def insertion_positions(token_ids: list[int], grids: Tensor, config: CasaConfig, start: int = 0) -> tuple[Tensor, int]:
    """Return the rotary positions of a stream with image tokens in it.

    Without M-RoPE positions just count. With it an image's tokens are at (t, t + row, t + column) and the text goes
    on after the largest of them, as in Qwen2.5-VL.

    Args:
        token_ids: The stream (T tokens); an image is a run of its N image tokens.
        grids: int64 (I, 3): one row for each image in the stream.
        config: Gives the image token, the merge size and whether the backbone has M-RoPE.
        start: Position of the first token.

    Returns:
        int64 (3, T) positions, and the position of the token that follows.

    Raises:
        InputError: The image tokens of the stream and the images do not match.
    """
    merge = config.vision_config.spatial_merge_size
    counts = image_token_counts(grids, merge)
    num_image_tokens = sum(token_id == config.image_token_id for token_id in token_ids)
    if num_image_tokens != sum(counts):
        raise InputError(
            f"the stream has {num_image_tokens} image tokens; its {len(counts)} images need {sum(counts)}: pass each "
            "image with all its tokens in one call."
        )
    if config.mrope_section is None:
        return torch.arange(start, start + len(token_ids)).expand(3, -1), start + len(token_ids)
    pieces, images = [], iter(range(len(counts)))
    for is_image, run in itertools.groupby(token_ids, lambda token_id: token_id == config.image_token_id):
        left = len(list(run))
        while left:
            if is_image:
                image = next(images)
                if counts[image] > left:
                    raise InputError(
                        f"{left} image tokens follow each other where image {image} needs {counts[image]}: pass each "
                        "image with all its tokens behind each other."
                    )
                height, width = int(grids[image][1]) // merge, int(grids[image][2]) // merge
                rows = torch.arange(height).repeat_interleave(width)
                columns = torch.arange(width).repeat(height)
                pieces.append(torch.stack([torch.zeros_like(rows), rows, columns]) + start)
                start, left = start + max(height, width), left - counts[image]
            else:
                pieces.append(torch.arange(start, start + left).expand(3, -1))
                start, left = start + left, 0
    positions = torch.cat(pieces, dim=1) if pieces else torch.zeros(3, 0, dtype=torch.long)
    return positions, start
