"""Picture files of `casa-export run`: bounded and whole before the processor prepares their pixels."""

import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image

from casa_engine.errors import InputError
from casa_engine.image_preparation import DECODER_FAULTS

# What casa-serve takes by default, too.
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_FILE_BYTES = 20_000_000
MAX_PIXELS = 16_777_216


def open_picture(path: Path) -> Image.Image:
    """Opens a picture as it is in its file: the processor turns it upright and puts it on white.

    Raises:
        InputError: It cannot be read, is no picture, damaged or too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Name a JPEG, PNG or WebP file.") from error
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes. Save it smaller.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is below Pillow's
            picture = Image.open(BytesIO(data), formats=FORMATS)
            width, height = picture.size
            if width * height <= MAX_PIXELS:
                picture.copy()  # decodes all of it; what is returned is decoded by the processor, once more
                return Image.open(BytesIO(data), formats=FORMATS)
    except DECODER_FAULTS as error:
        raise InputError(f"{path} is not a picture that can be read. Name a whole JPEG, PNG or WebP file.") from error
    raise InputError(f"{path} has {width} x {height} pixels; expected up to {MAX_PIXELS}. Scale it down.")
