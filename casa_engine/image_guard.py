"""Decides from its first bytes whether an image file may be decoded, for casa-serve and casa-export alike.

Nothing here decodes pixels: Pillow only reads the header of one of three formats, found by
content and not by the name or type that the client claims. Pillow's own message about a bad
file stays out of the message, because such texts have leaked memory addresses before.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from casa_engine.errors import InputError
from casa_engine.image_preparation import DECODER_FAULTS, without_texts

# For messages; `sniff` decides.
IMAGE_TYPES = "JPEG, PNG or WebP"
# A progressive JPEG refines the whole picture once for each scan. Encoders write about ten;
# hundreds are a way to keep a decoder busy for minutes with a small file.
MAX_JPEG_SCANS = 100
JPEG_START_OF_SCAN = b"\xff\xda"


@dataclass(frozen=True)
class ImageFileLimits:
    """Limits on one image file, checked against its header before anything is decoded.

    Attributes:
        max_image_bytes: Size of the file, after base64 decoding or download.
        max_image_pixels: Width times height. 4096 x 4096 fits exactly.
        max_image_side: Width or height.
        max_image_aspect: Longer side over shorter side. Qwen2-VL's resize, which CASA's image processor is, refuses
            more than 200 itself.
    """

    max_image_bytes: int = 20_000_000
    max_image_pixels: int = 4096 * 4096
    max_image_side: int = 16_384
    max_image_aspect: int = 200

    def option_note(self, name: str) -> str:
        """Return what an error adds about the option that sets a limit; empty where there is none."""
        return ""


class ImageRefusedError(InputError):
    """An image that is not decoded; the message has the reason and what would be accepted."""


def check_image(data: bytes, limits: ImageFileLimits) -> tuple[int, int]:
    """Check an encoded image against the limits without decoding it.

    Args:
        data: The encoded file.
        limits: What is allowed.

    Returns:
        Width and height in pixels, as stored (before the EXIF orientation is applied).

    Raises:
        ImageRefusedError: the image is of no allowed type, damaged in its header or over a limit.
    """
    check_size(len(data), limits)
    format_name = sniff(data)
    width, height = read_header(data, format_name, limits)
    if width * height > limits.max_image_pixels:
        raise ImageRefusedError(
            f"The image has too many pixels: got {width} x {height} = {width * height}, at most "
            f"{limits.max_image_pixels} are taken{limits.option_note('max_image_pixels')}. Scale it down first."
        )
    if max(width, height) > limits.max_image_side:
        raise ImageRefusedError(
            f"The image is too long: got {width} x {height}, at most {limits.max_image_side} "
            f"pixels a side are taken{limits.option_note('max_image_side')}. Scale it down or cut it first."
        )
    if max(width, height) > limits.max_image_aspect * min(width, height):
        raise ImageRefusedError(
            f"The image is too narrow: got {width} x {height}, the longer side may be at most "
            f"{limits.max_image_aspect} times the shorter one{limits.option_note('max_image_aspect')}. Cut or pad it."
        )
    if format_name == "JPEG" and data.count(JPEG_START_OF_SCAN) > MAX_JPEG_SCANS:
        raise ImageRefusedError(
            f"The JPEG has too many scans: got {data.count(JPEG_START_OF_SCAN)}, at most "
            f"{MAX_JPEG_SCANS} are taken. Save it again as a baseline JPEG."
        )
    return width, height


def check_size(num_bytes: int, limits: ImageFileLimits) -> None:
    """Reject an image file of `num_bytes` that is empty or over the limit."""
    if num_bytes == 0:
        raise ImageRefusedError(f"The image is empty: got 0 bytes. Send a {IMAGE_TYPES} file.")
    if num_bytes > limits.max_image_bytes:
        raise ImageRefusedError(
            f"The image file is too large: got {num_bytes} bytes, at most "
            f"{limits.max_image_bytes} are taken{limits.option_note('max_image_bytes')}. Compress it or scale it down."
        )


def sniff(data: bytes) -> str:
    """Return the format's name ("JPEG", "PNG" or "WEBP") from the first bytes of a file."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    raise ImageRefusedError(
        "The data is not an image of a type that is taken: its content is neither JPEG, PNG nor "
        "WebP. Convert it to one of these."
    )


def read_header(data: bytes, format_name: str, limits: ImageFileLimits) -> tuple[int, int]:
    """Return width and height as the file's header states them."""
    try:
        with Image.open(BytesIO(without_texts(data)), formats=(format_name,)) as image:
            return image.size
    except Image.DecompressionBombError as error:
        # Pillow's own last line of defence: it stops at 179 million pixels without a size.
        raise ImageRefusedError(
            f"The image has too many pixels: at most {limits.max_image_pixels} are taken"
            f"{limits.option_note('max_image_pixels')}. Scale it down first."
        ) from error
    except DECODER_FAULTS as error:
        raise ImageRefusedError(
            f"The image cannot be read: it begins as a {format_name} file, but its header is "
            "damaged or cut off. Send the whole file."
        ) from error
