"""Images for the tests of the endpoint, good and bad ones."""

import base64
import struct
import zlib
from io import BytesIO

from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """Return an image as a file's bytes."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(width: int = 56, height: int = 28, colour: object = "white", mode: str = "RGB") -> Image.Image:
    """Return an image of one colour."""
    return Image.new(mode, (width, height), colour)


def data_url(data: bytes, mime: str = "image/png") -> str:
    """Return a base64 data URL."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def png_bomb(width: int, height: int) -> bytes:
    """Return a valid PNG of one black row after the other, made without ever holding it.

    20,000 x 20,000 pixels are 400 MB in grey and 1.2 GB in RGB; the file has under 400 kB.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    packer = zlib.compressobj(9)
    row = bytes(width + 1)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
