"""What the benchmarks show: frames of noise, as the published speed benchmark does. Nothing is alike in two of them."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image

JPEG_QUALITY = 75


def noise_frame(seed: int | Sequence[int], number: int, side_px: int) -> Image.Image:
    """Return frame `number` of the video `seed`: a square RGB image of random pixels, always the same."""
    pixels = np.random.default_rng([seed, number]).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def jpeg(frame: Image.Image) -> bytes:
    """Return a frame as a JPEG file, for what travels to a server: noise as PNG is as large as its pixels."""
    file = BytesIO()
    frame.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
