"""Many small arrays to the device in one copy."""

from collections.abc import Sequence

import numpy as np
import torch

# Each array begins at a multiple of the largest element's size.
ALIGNMENT = 8


def copy_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copy arrays to the device through one pinned buffer, without waiting for it.

    Returns:
        Tensors of the same shapes and dtypes, in order; views of one allocation.
    """
    starts, num_bytes = [], 0
    for array in arrays:
        starts.append(num_bytes)
        num_bytes += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = np.empty(num_bytes, np.uint8)
    for array, start in zip(arrays, starts, strict=True):
        buffer[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    copied = torch.from_numpy(buffer)
    if device.type == "cuda":
        # From memory that may be swapped out, the copy would wait for the device.
        copied = copied.pin_memory()
    copied = copied.to(device, non_blocking=True)
    return [
        copied[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]
