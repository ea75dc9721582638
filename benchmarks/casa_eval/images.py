"""The image of a sample: read from its cell, checked before it is decoded, scaled down as the protocol does."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from casa_engine.errors import InputError
from casa_engine.image_guard import ImageFileLimits, check_image, check_size, sniff
from casa_engine.image_preparation import DECODER_FAULTS, read_image

# Wider than what a server takes from strangers: scanned documents and infographics are large, and are scaled down here.
LIMITS = ImageFileLimits(max_image_bytes=64 * 2**20, max_image_pixels=Image.MAX_IMAGE_PIXELS, max_image_side=65_000)
# Side of the square of pixels that is one image token (patches of 14, merged two by two): sides become multiples of
# it, so that the model's own preprocessing does not scale again.
UNIT_PX = 28


def read_cell(cell: object, folder: Path) -> bytes:
    """Return the file of an image.

    Args:
        cell: As `datasets` stores it, {"bytes": ..., "path": ...}, or the path of a file.
        folder: Where paths begin; none leads out of it.

    Raises:
        InputError: There is none, or it is too large.
    """
    path = cell
    if isinstance(cell, Mapping):
        if isinstance(cell.get("bytes"), bytes):
            return cell["bytes"]
        path = cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not isinstance(path, str) or not path:
        raise InputError(f"image is {type(cell).__name__}; expected the bytes or the path of an image file.")
    place = Path(os.path.normpath(folder / path))
    if not place.is_relative_to(os.path.normpath(folder)):
        raise InputError(f"image is at {path[:200]!r}; expected a path inside {folder}.")
    try:
        with place.open("rb") as file:
            check_size(os.fstat(file.fileno()).st_size, LIMITS)
            return file.read()
    except (OSError, ValueError) as error:
        raise InputError(f"image {path[:200]!r} cannot be read: {error}.") from error


def decode(data: bytes, image_size: int) -> Image.Image:
    """Return an image in RGB, of at most `image_size` squared pixels.

    Raises:
        InputError: It is of another type than JPEG, PNG or WebP, damaged or over a limit.
    """
    check_image(data, LIMITS)
    try:
        return scaled_down(read_image(data, sniff(data)), image_size)
    except DECODER_FAULTS as error:
        raise InputError("the image is damaged or cut off behind its header.") from error


def scaled_down(image: Image.Image, image_size: int) -> Image.Image:
    """Return an image of the same shape with at most `image_size` squared pixels, itself where it has no more."""
    pixels = image.width * image.height
    if pixels <= image_size**2:
        return image
    scale = image_size / math.sqrt(pixels)
    sides = (max(1, math.floor(side * scale / UNIT_PX)) * UNIT_PX for side in image.size)
    return image.resize(tuple(sides), Image.Resampling.BICUBIC)


class ImageSpool:
    """Images by name, in a temporary file: a set may have more of them than memory.

    Args:
        rows: Of the table of images.
        key: The column with their names.
        folder: See `read_cell`.

    A row without an image is left out: its questions say that there is none.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], key: str, folder: Path) -> None:
        self._file = tempfile.TemporaryFile()
        self._places: dict[str, tuple[int, int]] = {}
        for row in rows:
            try:
                data = read_cell(row.get("image"), folder)
            except InputError:
                continue
            self._places[str(row.get(key))] = (self._file.tell(), len(data))
            self._file.write(data)

    def read(self, name: object) -> bytes:
        """Return the file of an image.

        Raises:
            InputError: There is none of that name.
        """
        if str(name) not in self._places:
            raise InputError(f"there is no image {str(name)[:40]!r} in the table of images.")
        offset, length = self._places[str(name)]
        self._file.seek(offset)
        return self._file.read(length)

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()
