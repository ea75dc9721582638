"""What a person sees of an image file, as 8-bit RGB: the one place where pixels are prepared.

    file -> without_texts -> Pillow -> orientation of EXIF -> levels of 8 bits -> transparency on white -> RGB

Endpoint, live sessions, captioner, export and the processor itself all come through here, so that one file
means one picture. The judge is a browser: where Pillow's own conversions differ (greys of 16 bits are clipped,
a transparent colour is compared with scaled samples, XMP turns a photo), the browser is followed.
"""

import struct
from abc import ABC, abstractmethod
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from casa_engine.errors import InputError

# Everything that Pillow is known to raise on damaged input, in opening as in decoding.
DECODER_FAULTS = (
    OSError,  # also UnidentifiedImageError and "image file is truncated"
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    ZeroDivisionError,
    Image.DecompressionBombError,
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Pillow rejects a PNG with more than 1 MB of any of these; none of them changes what is seen here.
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
ORIENTATION = 0x0112
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WHITE = (255, 255, 255)


class EncodedImage(ABC):
    """An image file that a guard has let through and that is decoded only when its pixels are needed.

    Attributes:
        data: The file; its digest is the image's identity.
    """

    data: bytes

    @abstractmethod
    def decode(self) -> Image.Image:
        """Return the image, prepared.

        Raises:
            InputError: What is behind the header is damaged.
        """


def read_image(data: bytes, format_name: str) -> Image.Image:
    """Decode a file of a known format.

    Args:
        data: The encoded file.
        format_name: Pillow's name of the format; no other is tried.

    Returns:
        The picture in RGB, upright, on white.

    Raises:
        OSError, ValueError, ...: Whatever Pillow raises on damaged files.
    """
    with Image.open(BytesIO(without_texts(data)), formats=(format_name,)) as image:
        return _without_notes(_shown(image))


def prepare_image(image: Image.Image) -> Image.Image:
    """Return what a person sees of a Pillow image, in RGB; the image itself where it is nothing but that.

    Args:
        image: Of any mode. `I;16` and its kin hold levels of 16 bits. `I` and `F` have no range of their own:
            levels up to 255 are taken as 8 bits, in `I` up to 65,535 as 16 bits.

    Raises:
        InputError: A mode or levels without a known meaning.
    """
    shown = _shown(image)
    if shown is image and image.info:
        shown = image.copy()
    return _without_notes(shown)


def as_image(value: object) -> Image.Image:
    """Return an image from what a program may give as one, prepared.

    Args:
        value: A Pillow image, or a numpy array or tensor of uint8, (height, width, channels) or
            (channels, height, width) with 1, 3 or 4 channels, or (height, width).

    Raises:
        InputError: Anything else: a path or an address is an order to read or to connect, and never followed.
    """
    if isinstance(value, Image.Image):
        return prepare_image(value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy() if value.dtype == torch.uint8 else value
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        got = f"{type(value).__name__} of {value.dtype}" if hasattr(value, "dtype") else type(value).__name__
        raise InputError(
            f"an image is given as {got}; expected pixels: a Pillow image, or an array or tensor of uint8. Paths and "
            "addresses are not followed: open the file first."
        )
    if value.ndim == 3 and value.shape[-1] not in (1, 3, 4) and value.shape[0] in (1, 3, 4):
        value = np.moveaxis(value, 0, -1)
    if value.ndim == 3 and value.shape[-1] == 1:
        value = value[..., 0]
    if value.ndim not in (2, 3) or (value.ndim == 3 and value.shape[-1] not in (3, 4)) or not value.size:
        raise InputError(
            f"an image is an array of shape {value.shape}; expected (height, width, channels) with 1, 3 or 4 channels."
        )
    return prepare_image(Image.fromarray(np.ascontiguousarray(value)))


def without_texts(data: bytes) -> bytes:
    """Return a PNG without its texts and colour profile, and anything else as it is."""
    if not data.startswith(PNG_SIGNATURE) or not any(kind in data for kind in PNG_TEXTS):
        return data
    kept, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, start)
        end = start + 12 + length
        if data[start + 4 : start + 8] not in PNG_TEXTS:
            kept.append(data[start:end])
        start = end
    kept.append(data[start:])
    return b"".join(kept)


def _shown(image: Image.Image) -> Image.Image:
    # Both before the pixels are loaded: what follows these in a file is not read.
    key_bits, turned = _sample_bits(image), TRANSPOSITIONS.get(_orientation(image))
    image.load()
    shown = _rgb(image, key_bits)
    return shown if turned is None else shown.transpose(turned)


def _without_notes(image: Image.Image) -> Image.Image:
    """Drop notes that have been followed and must not be followed again."""
    image.info = {}
    return image


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation where Chromium follows it, else 1.

    It does in JPEG, and in PNG where EXIF precedes the pixels. It does not in WebP, nor does it follow XMP, as
    Pillow would. tests/browser/test_picture_files.py holds this to Chromium.
    """
    if image.format == "WEBP":
        return 1
    try:
        if image.format is None:  # Of a program: there may be no file behind it.
            return image.getexif().get(ORIENTATION, 1)
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        return exif.get(ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, OverflowError, struct.error):
        return 1  # A picture with a damaged note about it is still a picture.


def _sample_bits(image: Image.Image) -> int:
    """Return the bits of a sample in a PNG that is not yet loaded; 8 where nothing else is known."""
    modes = [str(arguments) for *_, arguments in getattr(image, "tile", ())]
    for bits in (16, 4, 2, 1):
        if any(f";{bits}" in mode or (bits == 1 and mode == "1") for mode in modes):
            return bits
    return 8


def _rgb(image: Image.Image, key_bits: int) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_grey(image)
    key = image.info.get("transparency")
    if key is not None and image.mode in ("1", "L", "RGB"):
        return _without_key(image, key, key_bits)
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or (image.mode == "P" and key is not None):
        return _on_white(image)
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise InputError(f"an image has mode {image.mode!r}; expected one that can be shown: convert it.") from error


def _on_white(image: Image.Image) -> Image.Image:
    straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
    image = (image.convert(straight) if straight else image).convert("RGBA")
    shown = Image.new("RGB", image.size, WHITE)
    shown.paste(image, mask=image.getchannel("A"))
    return shown


def _from_deep_grey(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)
    if image.mode.startswith("I;16"):
        levels = levels.astype(np.uint16, copy=False)  # Big-endian ones too.
        grey = (levels >> 8).astype(np.uint8)
    else:
        low, high = float(levels.min()), float(levels.max())
        if image.mode == "I" and 0 <= low and 255 < high <= 65_535:
            grey = (levels >> 8).astype(np.uint8)
        elif 0 <= low and high <= 255:  # False for NaN.
            grey = np.rint(levels).astype(np.uint8)
        else:
            raise InputError(
                f"an image of mode {image.mode!r} has levels from {low:g} to {high:g}; expected 0 to 255: scale it to "
                "8 bits first."
            )
    shown = np.repeat(grey[..., None], 3, axis=-1)
    key = image.info.get("transparency")
    if isinstance(key, int):
        shown[levels == key] = WHITE
    return Image.fromarray(shown)


def _without_key(image: Image.Image, key: object, key_bits: int) -> Image.Image:
    """Return the image with white for its one transparent colour, which PNG states in samples of the file's depth."""
    samples = np.asarray([key] if isinstance(key, int) else list(key), dtype=np.int64)
    if key_bits == 16 or samples.max(initial=0) > 255:
        samples = samples >> 8
    elif key_bits < 8 or image.mode == "1":
        samples = samples * 255 // ((1 << (1 if image.mode == "1" else key_bits)) - 1)
    shown = np.array(image.convert("RGB"))
    shown[(shown == samples).all(axis=-1)] = WHITE
    return Image.fromarray(shown)
