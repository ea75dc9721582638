"""`casa-export run` on files that are no pictures, prompts that are no text: a sentence, before any model loads."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from casa_export import cli

pytestmark = pytest.mark.unit


def encoded(size=(64, 48), name="PNG", **options) -> bytes:
    buffer = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, name, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size: a bomb where somebody decodes it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = (header, data, b"IEND")
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


PICTURES = {
    "text": (b"hello", "neither JPEG, PNG nor WebP"),
    "empty": (b"", "got 0 bytes"),
    "truncated JPEG": (encoded(name="JPEG")[:-900], "damaged or cut off"),
    "truncated PNG": (encoded()[:2000], "damaged or cut off"),
    "cut header": (encoded()[:20], "header is damaged or cut off"),
    "bomb": (png_header(60_000, 60_000), "too many pixels"),
    "large": (png_header(6000, 6000), "got 6000 x 6000 = 36000000, at most 16777216 are taken. Scale"),
    "long": (png_header(16_400, 100), "at most 16384 pixels a side are taken. Scale"),
    "narrow": (png_header(300, 1), "at most 200 times the shorter one. Cut"),
    "many scans": (encoded(name="JPEG") + b"\xff\xda" * 200, "too many scans"),
    "GIF": (encoded(name="GIF"), "neither JPEG, PNG nor WebP"),
    "TIFF": (encoded(name="TIFF"), "neither JPEG, PNG nor WebP"),
    "long file": (encoded() + bytes(20_000_000), "at most 20000000 are taken. Compress"),
}


def sentence(arguments: list[str], capsys) -> str:
    assert cli.main(["run", "none", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("casa-export: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", PICTURES)
def test_file_that_is_no_picture(tmp_path, name, capsys):
    data, words = PICTURES[name]
    (tmp_path / "picture.png").write_bytes(data)
    error = sentence(["--prompt", "What?", "--image", str(tmp_path / "picture.png")], capsys)
    assert words in error and "picture.png" in error


def test_folder_and_missing_file(tmp_path, capsys):
    assert "Is a directory" in sentence(["--prompt", "What?", "--image", str(tmp_path)], capsys)
    assert "No such file" in sentence(["--prompt", "What?", "--image", str(tmp_path / "none.png")], capsys)


def test_options(capsys):
    assert "not valid UTF-8" in sentence(["--prompt", b"\xff".decode(errors="surrogateescape")], capsys)
    assert "expected at least 1" in sentence(["--prompt", "What?", "--max-new-tokens", "0"], capsys)
    assert "--threads -1" in sentence(["--prompt", "What?", "--threads", "-1"], capsys)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_taken(tmp_path, name, capsys):
    (tmp_path / "picture").write_bytes(encoded(name=name))
    assert "no manifest.json" in sentence(["--prompt", "What?", "--image", str(tmp_path / "picture")], capsys)
