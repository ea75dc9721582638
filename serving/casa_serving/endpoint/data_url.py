"""Data URLs as browsers read them: WHATWG's data URL processor and its forgiving base64.

data:image/png;base64,iVBOR...     blanks, line breaks and %XX anywhere, padding or none, ;BASE64
"""

from __future__ import annotations

import binascii
from urllib.parse import unquote_to_bytes

SCHEME = "data:"
BLANKS = b"\t\n\f\r "


def is_data_url(url: str) -> bool:
    """Return whether a URL is a data URL."""
    return url.lstrip()[: len(SCHEME)].lower() == SCHEME


def base64_text(url: str) -> str | None:
    """Return the data of a base64 data URL, still encoded; None for every other URL."""
    kind, comma, text = url.lstrip()[len(SCHEME) :].partition(",")
    _, semicolon, encoding = kind.rpartition(";")
    if not (comma and semicolon) or encoding.strip(" ").lower() != "base64":
        return None
    return text.partition("#")[0]


def compact(text: str) -> bytes:
    """Return base64 without blanks, line breaks, percent-encoding and padding.

    Raises:
        binascii.Error: It is not ASCII.
    """
    try:
        data = text.encode("ascii")
    except UnicodeEncodeError as error:
        raise binascii.Error("not ASCII") from error
    if b"%" in data:
        data = unquote_to_bytes(data)
    data = data.translate(None, BLANKS)
    if len(data) % 4 == 0:
        data = data.removesuffix(b"=").removesuffix(b"=")
    return data


def decoded(data: bytes) -> bytes:
    """Return the decoded bytes of compact base64.

    Raises:
        binascii.Error: It is no valid base64.
    """
    if len(data) % 4 == 1 or b"=" in data:
        raise binascii.Error("wrong length")
    return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
