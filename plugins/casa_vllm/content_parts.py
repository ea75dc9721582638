"""Checks the parts of messages: text and images. Everything else is rejected before vLLM reads it.

vLLM picks a part's content by its `type`, or, if that is missing or a `uuid` is set, by the first field that it
knows; some of these name files or URLs that the server would open itself. Here each part becomes text or one form of
image.
"""

from collections.abc import Iterable
from typing import Any

from PIL import Image

from casa_engine.errors import InputError

TEXTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking", "tool_reference"})
IMAGES = frozenset({"image_url", "input_image"})
PIXELS = "image_pil"
PROMPT_EMBEDS = "prompt_embeds"
SHOWN_LETTERS = 32


def checked_messages(messages: Iterable[Any], *, takes_prompt_embeds: bool) -> list[Any]:
    """Return chat messages whose parts are text or images.

    Args:
        messages: From a client, or from a program in this process.
        takes_prompt_embeds: Whether the operator lets clients send embeddings as text (`--enable-prompt-embeds`).

    Raises:
        InputError: A part is neither.
    """
    return [_checked_message(message, takes_prompt_embeds) for message in messages]


def _checked_message(message: Any, takes_prompt_embeds: bool) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    if content is None or isinstance(content, str):
        return message
    if isinstance(content, dict) or not isinstance(content, Iterable):
        raise InputError(f"a message's content is {type(content).__name__}; expected text or a list of parts.")
    parts = [_checked_part(part, takes_prompt_embeds) for part in content]
    return {**message, "content": parts}


def _checked_part(part: Any, takes_prompt_embeds: bool) -> Any:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise InputError(f"a part of a message is {type(part).__name__}; expected text or an object with a type.")
    kind, is_named = part.get("type"), part.get("uuid") is not None
    if kind in TEXTS and not is_named:
        return part
    if kind == PROMPT_EMBEDS and takes_prompt_embeds and not is_named:
        return part
    if "image_url" in part and (kind is None or kind in IMAGES):
        return _image(part)
    if PIXELS in part and kind in (None, PIXELS) and isinstance(part[PIXELS], Image.Image):
        return part  # From a program in this process: JSON cannot contain one.
    shown = "no type" if kind is None else f"type {str(kind)[:SHOWN_LETTERS]!r}"
    raise InputError(
        f"a part of a message has {shown} and is neither text nor an image from a URL; expected the type text, or "
        "image_url with its URL or uuid. No audio, no video, no embeddings, no files of the server."
    )


def _image(part: dict[str, Any]) -> dict[str, Any]:
    url = part["image_url"]
    if isinstance(url, dict):
        url = url.get("url")
    if url is not None and not isinstance(url, str):
        raise InputError(f"an image's URL is {type(url).__name__}; expected text.")
    rest = {name: value for name, value in part.items() if name not in ("type", "image_url", "detail")}
    return {**rest, "type": "image_url", "image_url": {"url": url} if url else None}
