"""The chat template of an original: its own where that writes our marker of an image, otherwise this engine's."""

from collections.abc import Mapping
from typing import Any

from casa_engine.originals.field_tables import OPEN
from casa_engine.originals.fields import Value
from casa_engine.originals.rules import KNOWN
from casa_engine.originals.snapshot import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from casa_engine.tokenization import IMAGE

CHAT_TEMPLATE, OWN, OURS = "chat_template", "the original's", "this engine's"
PLACES = (TEMPLATE, "chat_template.json", TOKENIZER_CONFIG)


def own_template(documents: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the document that an original's chat template stands in, and the template; None where it has none.

    Of several, by name, it is the one called "default".
    """
    for name in PLACES:
        found = documents.get(name)
        if isinstance(found, dict):
            found = found.get(CHAT_TEMPLATE)
        if isinstance(found, list):
            named = {str(each.get("name")): each.get("template") for each in found if isinstance(each, dict)}
            found = named.get("default")
        if isinstance(found, str) and found:
            return name, found
    return None


def template_value(documents: Mapping[str, Any], image_token_id: int) -> Value:
    """Say which template counts, as a field: `text_files.py` writes that one."""
    own = own_template(documents)
    if own is None:
        return Value(CHAT_TEMPLATE, OURS, "this engine's choice: the original has none", OPEN)
    place, template = own
    marker = _marker(documents, image_token_id)
    if marker in template:
        return Value(CHAT_TEMPLATE, OWN, place, KNOWN)
    return Value(CHAT_TEMPLATE, OURS, f"this engine's choice: that of {place} has no {marker!r} and is not used", OPEN)


def _marker(documents: Mapping[str, Any], image_token_id: int) -> str:
    """Text of the image marker; where the tokenizer has no such token, the one that is added to it."""
    added = documents.get(TOKENIZER, {}).get("added_tokens", [])
    return next((str(row[1]) for row in added if row[0] == image_token_id), IMAGE)
