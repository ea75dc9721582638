"""Encodes the images of a step into the pages that its attention reads.

Independent of the runner. Keys and values are computed and written eagerly, before the step's forward pass.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.multimodal.utils import group_and_batch_mm_kwargs


@dataclass(frozen=True)
class ImageToEncode:
    """One image of a step.

    Attributes:
        data: The image's processed inputs (vLLM's `MultiModalKwargsItem`).
        num_tokens: N.
        pages: For each image group, int (pages,): the image's cache pages in order.
    """

    data: Any
    num_tokens: int
    pages: list[np.ndarray]

    def slots(self, group: int, block_size: int) -> torch.Tensor:
        """Return its cache slots in an image group; see `image_slots`."""
        return image_slots(torch.from_numpy(self.pages[group]), block_size, self.num_tokens)


def encode_images(
    model: Any,
    images: list[ImageToEncode],
    block_size: int,
    layer_groups: dict[str, int],
    device: torch.device,
) -> None:
    """Run the vision encoder once over all images and write their pages.

    Args:
        model: The CASA model.
        images: Images of the step.
        block_size: Of the image groups.
        layer_groups: Image group of each CA layer, by the layer's name.
        device: Of the model.

    Mutates:
        The model's image caches.
    """
    items = [("image", image.data) for image in images]
    start = 0
    for _, num_items, inputs in group_and_batch_mm_kwargs(items, device=device):
        batch = images[start : start + num_items]
        start += num_items
        encoded = torch.cat(list(model.embed_multimodal(**inputs)))
        slots = [
            torch.cat([image.slots(group, block_size) for image in batch]).to(device)
            for group in range(len(batch[0].pages))
        ]
        model.write_images(
            encoded,
            inputs["image_grid_thw"],
            {layer: slots[group] for layer, group in layer_groups.items()},
        )


def image_slots(pages: torch.Tensor, block_size: int, num_tokens: int) -> torch.Tensor:
    """Return the cache slots of an image's tokens; an image starts at a page's beginning.

    Args:
        pages: int (pages of the image,), in order.
        block_size: Image tokens of a page.
        num_tokens: N.

    Returns:
        (N,) int64, on the device of the pages.
    """
    slots = pages.long()[:, None] * block_size + torch.arange(block_size, device=pages.device)
    return slots.flatten()[:num_tokens]
