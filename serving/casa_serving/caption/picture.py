"""Converts a decoded frame for display: colours, pixel aspect, orientation and transparency.

The reference are browsers: the same file looks the same on the page.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import av

# The default colour space is BT.709 from this height on, BT.601 below.
HD_HEIGHT = 720
UNSPECIFIED, BT709 = 2, 1
# Of a display matrix: x' = a x + c y, y' = b x + d y, with y downwards; keyed by the signs of a, b, c, d.
TURNS = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
MATRIX = struct.Struct("<9i")


@dataclass(frozen=True)
class Look:
    """Display properties of all frames of a file.

    Attributes:
        pixel_aspect: Width over height of a pixel; None is square.
        turn: How frames are rotated and mirrored, or None.
    """

    pixel_aspect: Fraction | None = None
    turn: Image.Transpose | None = None

    @classmethod
    def of(cls, video: av.VideoStream, frame: av.VideoFrame) -> Look:
        """Return the properties of a stream and its first frame, which is freed only by Python's cycle collector."""
        return cls(video.sample_aspect_ratio, turn_of(frame))


def as_shown(frame: av.VideoFrame, look: Look) -> Image.Image:
    """Return a frame as RGB with square pixels, oriented as its file says, over white where it is transparent."""
    image = rgb(frame)
    size = square_pixels(image.width, image.height, look.pixel_aspect)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return image if look.turn is None else image.transpose(look.turn)


def rgb(frame: av.VideoFrame) -> Image.Image:
    """Return a frame's pixels as RGB."""
    is_guess = frame.colorspace == UNSPECIFIED and frame.height >= HD_HEIGHT and not frame.format.is_rgb
    matrix = {"src_colorspace": BT709} if is_guess else {}
    # A palette has transparent colours too.
    if not (frame.format.has_palette or any(component.is_alpha for component in frame.format.components)):
        return Image.fromarray(frame.to_ndarray(format="rgb24", **matrix))
    seen = Image.fromarray(frame.to_ndarray(format="rgba", **matrix))
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def square_pixels(width: int, height: int, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """Return the size of a picture with square pixels: the side that is too short is stretched."""
    if not pixel_aspect or pixel_aspect == 1:
        return width, height
    if pixel_aspect > 1:
        return round(width * pixel_aspect), height
    return width, round(height / pixel_aspect)


def turn_of(frame: av.VideoFrame) -> Image.Transpose | None:
    """Return how a frame's display matrix rotates and mirrors it, to the nearest quarter turn, or None."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = MATRIX.unpack(bytes(data)[: MATRIX.size])
            straight = abs(a) + abs(d) >= abs(b) + abs(c)
            signs = (sign(a), 0, 0, sign(d)) if straight else (0, sign(b), sign(c), 0)
            return TURNS[signs]
    return None


def sign(number: int) -> int:
    """Return -1 for negative numbers, otherwise 1."""
    return -1 if number < 0 else 1
