"""Image files of every kind that the endpoint takes, and what a person sees of each."""

import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

from image_files import encoded

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
RAMP = np.repeat(GREY[..., None], 3, axis=-1)


def shown(*values):
    """A row of pixels, 8 pixels high, one RGB value each."""
    return np.array([values] * 8, dtype=np.uint8)


def png(mode, width, height, rows, bits, colour, *chunks):
    """A PNG of given samples, written by hand: Pillow writes neither all depths nor all colour keys."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), *(chunk(*each) for each in chunks), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def exif(orientation):
    noted = Image.Exif()
    noted[0x0112] = orientation
    return noted


def behind_the_pixels(data):
    """Move a PNG's EXIF to the end of the file."""
    start, end = data.index(b"eXIf") - 4, data.index(b"IEND") - 4
    after = start + 12 + int.from_bytes(data[start : start + 4])
    return data[:start] + data[after:end] + data[start:after] + data[end:]


def xmp_of_a_turned_photo():
    text = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"></rdf></x:xmpmeta>'
    return text.encode()


def texts():
    """More than Pillow reads by itself."""
    information = PngImagePlugin.PngInfo()
    information.add_text("Comment", "x" * 1_200_000, zip=True)
    information.add_itxt("Other", "y" * 1_200_000, zip=True)
    return information


HALF = np.zeros((8, 8, 4), dtype=np.uint8)
HALF[:, :4] = (255, 0, 0, 255)
ORIENTED = np.zeros((16, 32, 3), dtype=np.uint8)
ORIENTED[:8, :16], ORIENTED[:8, 16:], ORIENTED[8:, :16] = (255, 0, 0), (0, 0, 255), (0, 255, 0)
PHOTO = Image.fromarray(ORIENTED)
# EXIF's orientation -> how the photo is seen.
TURNED = {
    1: ORIENTED,
    2: ORIENTED[:, ::-1],
    3: ORIENTED[::-1, ::-1],
    4: ORIENTED[::-1],
    5: ORIENTED.swapaxes(0, 1),
    6: ORIENTED[::-1].swapaxes(0, 1),
    7: ORIENTED[::-1, ::-1].swapaxes(0, 1),
    8: ORIENTED[:, ::-1].swapaxes(0, 1),
}
SIXTEEN = GREY.astype("uint16") * 257
# Name -> file, its format, and what a person sees.
FILES = {
    "8 bits": (encoded(Image.fromarray(GREY)), "PNG", RAMP),
    "16 bits": (encoded(Image.fromarray(SIXTEEN)), "PNG", RAMP),
    "16 bits, a transparent level": (
        png("L", 2, 1, [struct.pack(">HH", 0x1234, 0x1235)], 16, 0, (b"tRNS", struct.pack(">H", 0x1234))),
        "PNG",
        np.array([[[255] * 3, [0x12] * 3]], dtype=np.uint8),
    ),
    "16 bits of RGB, a transparent colour": (
        png(
            "RGB",
            2,
            1,
            [struct.pack(">6H", 65535, 0, 0, 0, 0, 65535)],
            16,
            2,
            (b"tRNS", struct.pack(">3H", 65535, 0, 0)),
        ),
        "PNG",
        np.array([[[255, 255, 255], [0, 0, 255]]], dtype=np.uint8),
    ),
    "16 bits of grey and alpha": (
        png("LA", 2, 1, [struct.pack(">4H", 0x8000, 65535, 0, 0)], 16, 4),
        "PNG",
        np.array([[[128] * 3, [255] * 3]], dtype=np.uint8),
    ),
    "1 bit": (png("1", 8, 1, [b"\xf0"], 1, 0), "PNG", np.array([[[255] * 3] * 4 + [[0] * 3] * 4], dtype=np.uint8)),
    "1 bit, white transparent": (
        png("1", 8, 1, [b"\xf0"], 1, 0, (b"tRNS", b"\0\1")),
        "PNG",
        np.array([[[255] * 3] * 4 + [[0] * 3] * 4], dtype=np.uint8),
    ),
    "1 bit, black transparent": (
        png("1", 8, 1, [b"\xf0"], 1, 0, (b"tRNS", b"\0\0")),
        "PNG",
        np.full((1, 8, 3), 255, dtype=np.uint8),
    ),
    "2 bits, a transparent level": (
        png("L", 4, 1, [bytes([0b00011011])], 2, 0, (b"tRNS", b"\0\2")),
        "PNG",
        np.array([[[0] * 3, [85] * 3, [255] * 3, [255] * 3]], dtype=np.uint8),
    ),
    "4 bits, a transparent level": (
        png("L", 2, 1, [bytes([0x37])], 4, 0, (b"tRNS", b"\0\3")),
        "PNG",
        np.array([[[255] * 3, [0x77] * 3]], dtype=np.uint8),
    ),
    "8 bits, a transparent level": (
        png("L", 2, 1, [bytes([5, 6])], 8, 0, (b"tRNS", b"\0\5")),
        "PNG",
        np.array([[[255] * 3, [6] * 3]], dtype=np.uint8),
    ),
    "RGB, a transparent colour": (
        png("RGB", 2, 1, [bytes([1, 2, 3, 3, 2, 1])], 8, 2, (b"tRNS", bytes([0, 1, 0, 2, 0, 3]))),
        "PNG",
        np.array([[[255] * 3, [3, 2, 1]]], dtype=np.uint8),
    ),
    "palette with alphas": (
        png(
            "P",
            3,
            1,
            [bytes([0, 1, 2])],
            8,
            3,
            (b"PLTE", bytes([255, 0, 0, 0, 0, 0, 0, 0, 255])),
            (b"tRNS", b"\xff\x00\xff"),
        ),
        "PNG",
        np.array([[[255, 0, 0], [255] * 3, [0, 0, 255]]], dtype=np.uint8),
    ),
    "RGBA": (encoded(Image.fromarray(HALF)), "PNG", shown(*[(255, 0, 0)] * 4, *[(255, 255, 255)] * 4)),
    "RGBA in WebP": (
        encoded(Image.fromarray(HALF), "WEBP", lossless=True),
        "WEBP",
        shown(*[(255, 0, 0)] * 4, *[(255, 255, 255)] * 4),
    ),
    "LA": (
        encoded(Image.fromarray(HALF).convert("LA")),
        "PNG",
        shown(*[(76, 76, 76)] * 4, *[(255, 255, 255)] * 4),
    ),
    "CMYK of Adobe's kind": (
        encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100),
        "JPEG",
        shown(*[(254, 0, 0)] * 8),
    ),
    **{
        f"JPEG turned by EXIF, {number}": (
            encoded(PHOTO, "JPEG", quality=100, subsampling=0, exif=exif(number)),
            "JPEG",
            seen,
        )
        for number, seen in TURNED.items()
    },
    "PNG turned by EXIF": (encoded(PHOTO, exif=exif(6)), "PNG", TURNED[6]),
    "PNG with EXIF behind the pixels": (behind_the_pixels(encoded(PHOTO, exif=exif(6))), "PNG", ORIENTED),
    "WebP with EXIF": (encoded(PHOTO, "WEBP", lossless=True, exif=exif(6)), "WEBP", ORIENTED),
    "XMP says turned": (
        encoded(PHOTO, "JPEG", quality=100, subsampling=0, xmp=xmp_of_a_turned_photo()),
        "JPEG",
        ORIENTED,
    ),
    "damaged EXIF": (
        encoded(PHOTO, "JPEG", quality=100, subsampling=0, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "JPEG",
        ORIENTED,
    ),
    "long texts": (encoded(Image.fromarray(RAMP), pnginfo=texts()), "PNG", RAMP),
    "large colour profile": (encoded(Image.fromarray(RAMP), icc_profile=bytes(2_000_000)), "PNG", RAMP),
}
