"""An image's patches in bytes: an eighth of what the vision encoder takes, and the same values once they are there.

    image -> resized, cut: uint8 (P, 3 * S) -> cache, other process -> float32 (P, 3 * T * S) -> vision encoder

S is a patch's number of pixels. The encoder takes T equal copies of a still image (a video would have T frames), in
float32; neither needs to be kept or sent.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image

LEVELS = 256
CHANNELS = 3


def byte_patches(image_processor: Any, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """Resizes one image and cuts it into patches.

    Args:
        image_processor: A Qwen2-VL image processor.
        image: In RGB.

    Returns:
        uint8 (P, 3 * S) patches, and int64 (3,) their grid (t, h, w).
    """
    cut = image_processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="pt")
    levels = cut["pixel_values"].view(-1, CHANNELS, image_processor.temporal_patch_size, image_processor.patch_size**2)
    return levels[:, :, 0].to(torch.uint8).flatten(1), cut["image_grid_thw"][0]


class PatchValues:
    """What the image processor makes of each level of each channel, as a table that it has filled in itself.

    Args:
        image_processor: A Qwen2-VL image processor.
    """

    def __init__(self, image_processor: Any) -> None:
        self._copies = image_processor.temporal_patch_size
        side = image_processor.patch_size * image_processor.merge_size
        side *= -(-int(LEVELS**0.5) // side)
        ramp = np.resize(np.arange(LEVELS, dtype=np.uint8), (side, side))
        options = {"images": [Image.fromarray(ramp).convert("RGB")], "do_resize": False, "return_tensors": "pt"}
        levels = image_processor(**options, do_rescale=False, do_normalize=False)["pixel_values"].long()
        values = image_processor(**options)["pixel_values"]
        self._table = torch.zeros(CHANNELS, LEVELS, dtype=torch.float32)
        for channel, (of_levels, of_values) in enumerate(
            zip(levels.chunk(CHANNELS, dim=1), values.chunk(CHANNELS, dim=1), strict=True)
        ):
            self._table[channel, of_levels.flatten()] = of_values.flatten()

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        """Converts uint8 (P, 3 * S) to float32 (P, 3 * T * S), on the same device."""
        if self._table.device != patches.device:
            self._table = self._table.to(patches.device)
        channels = patches.view(len(patches), CHANNELS, -1)
        values = torch.stack([row[channels[:, index].int()] for index, row in enumerate(self._table)], dim=1)
        return values.unsqueeze(2).expand(-1, -1, self._copies, -1).flatten(1)
