"""Digests of the images in a request, by which the router sends requests about the same image together.

A digest is of the image's UUID if the client sends one, otherwise of its URL; a data URL contains the
whole file, so that its digest is a hash of the content. They are computed where the body is read, so
that no later hop has to read it again, and are short, whatever a client sends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

DIGEST_BYTES = 16


def request_image_keys(headers: Mapping[str, str], body: bytes) -> tuple[str, ...]:
    """Return the digests of all images in a request, on any path; none if its body cannot be parsed.

    Args:
        headers: Of the request.
        body: JSON, if it is a request with images.
    """
    # Most bodies without images need not be parsed; an encoded one is rejected by the application.
    if b"image_url" not in body or "content-encoding" in headers:
        return ()
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(parsed, dict):
        return ()
    # The latter in /v1/responses.
    return digest_images(parsed.get("messages") or parsed.get("input"))


def digest_images(messages: Any) -> tuple[str, ...]:
    """Return the digests of all images in OpenAI chat messages, each once, in order.

    Args:
        messages: The messages as mappings, or the items of `/v1/responses`; anything that is not an image
            part is ignored, since the engine and not the router validates requests.
    """
    parts = (part for message in (messages if isinstance(messages, list) else ()) for part in _parts(message))
    return tuple(dict.fromkeys(key for part in parts for key in _keys(part)))


def _parts(message: Any) -> Iterator[dict[str, Any]]:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        yield from (part for part in content if isinstance(part, dict))


def _keys(part: dict[str, Any]) -> Iterator[str]:
    """Yield the image's digest if the part is an image."""
    if "image_url" not in part:
        return
    if isinstance(part.get("uuid"), str):
        yield digest(f"uuid:{part['uuid']}")
        return
    image = part["image_url"]
    url = image.get("url") if isinstance(image, dict) else image
    if isinstance(url, str):
        yield digest(f"url:{url}")


def digest(text: str) -> str:
    """Return the digest of a text; "" for an empty one."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).hexdigest() if text else ""
