"""A batched forward of the vision tower for training: images of one grid at a time, without Python loops.

Transformers' own forward attends image by image; with small images on a CPU that costs more than the arithmetic. Here
all images of a call have the same grid, so patches form one (B, P, C) tensor. It uses the modules and weights of
`Qwen2_5_VisionTransformerPretrainedModel`; a test holds the two forwards together.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    apply_rotary_pos_emb_vision,
)

from casa_digits.data import CELL_PX, Grid

PATCH_PX = 14
MERGE = 2
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def patchify(images: np.ndarray) -> Tensor:
    """Cut (B, H, W, 3) uint8, sides multiples of 28, into (B, P, 588) float32 patches, the 4 of a cell together.

    One temporal tap of what the Qwen2-VL image processor gives (it holds every value twice).
    """
    batch, height, width, _ = images.shape
    x = (images.astype(np.float32) / 255.0 - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)
    x = x.reshape(batch, height // CELL_PX, MERGE, PATCH_PX, width // CELL_PX, MERGE, PATCH_PX, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)
    return torch.from_numpy(np.ascontiguousarray(x).reshape(batch, -1, 3 * PATCH_PX * PATCH_PX))


def patch_positions(grid: Grid) -> Tensor:
    """Return row and column of each patch, int64 (2, P), in the order of `patchify`."""
    index = torch.arange(grid.rows * MERGE * grid.columns * MERGE)
    table = index.view(grid.rows, MERGE, grid.columns, MERGE).permute(0, 2, 1, 3).reshape(-1)
    return torch.stack([table // (grid.columns * MERGE), table % (grid.columns * MERGE)])


def rotary_tables(grid: Grid, head_dim: int) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines, (P, D) each: a quarter of D follows the row, a quarter the column, twice."""
    frequencies = 10000.0 ** -(torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    angles = (patch_positions(grid).T[..., None] * frequencies).flatten(1).repeat(1, 2)
    return angles.cos(), angles.sin()


def encode(tower: Qwen2_5_VisionTransformerPretrainedModel, patches: Tensor, grid: Grid) -> Tensor:
    """Compute the image tokens of equal-sized images.

    Args:
        tower: The vision tower; its windows must be single cells (window_size 28).
        patches: (B, P, 588) float32.
        grid: Size in cells; P = 4 * cells.

    Returns:
        (B, cells, C) float32, C the tower's output width.
    """
    batch, num_patches, _ = patches.shape
    weight = tower.patch_embed.proj.weight.sum(dim=2).flatten(1)
    hidden = functional.linear(patches, weight)
    cos, sin = rotary_tables(grid, tower.config.hidden_size // tower.config.num_heads)
    cell_shape = (batch * grid.num_cells, MERGE * MERGE)
    for number, block in enumerate(tower.blocks):
        full = number in tower.fullatt_block_indexes
        shape = (batch, num_patches) if full else cell_shape
        repeats = 1 if full else batch
        tables = [
            table if full else table.view(grid.num_cells, MERGE * MERGE, -1).repeat(repeats, 1, 1)
            for table in (cos, sin)
        ]
        normed = block.norm1(hidden).view(*shape, -1)
        hidden = hidden + _attend(block.attn, normed, *tables).view(batch, num_patches, -1)
        hidden = hidden + block.mlp(block.norm2(hidden))
    return tower.merger(hidden).view(batch, grid.num_cells, -1)


def _attend(attention: torch.nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute full attention within each row of (R, L, C)."""
    query, key, value = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = functional.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
    return attention.proj(out.transpose(1, 2).flatten(-2))
