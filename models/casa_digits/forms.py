r"""Small JSON objects that hold what an image shows, and which of their characters a model can know.

Under a grammar the server forces names, marks and blanks; the model sees them as they come, never the schema. What it
can know are the values and what ends them, from a field's type and name:

    integer              "count": 3             how many digits; also under names that it does not know
                         "first": 3, "last": 1  that digit
    list of integers     "digits": [3, 7, 1]    the digits, under any name
    list of strings      "digits": ["3", "7"]   the same
    string               "text": "3 7 1"        the digits as in an answer, under any name
    object               "result": {...}        of these again
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from casa_digits.phrases import COUNT_NAMES, FIRST_NAMES, LAST_NAMES, LIST_NAMES, OBJECT_NAMES, TEXT_NAMES

INTEGER, INTEGERS, STRINGS, STRING = "integer", "[integer]", "[string]", "string"
TYPES = (INTEGER, INTEGERS, STRINGS, STRING)
TYPE_SHARES = (0.35, 0.4, 0.07, 0.18)
NAMES = {INTEGER: COUNT_NAMES, INTEGERS: LIST_NAMES, STRINGS: LIST_NAMES, STRING: TEXT_NAMES}
COMPACT, SPACED = (",", ":"), (", ", ": ")
# Around a call of a tool, as the chat template writes it.
CALL_START, CALL_END = "<tool_call>\n", "\n</tool_call>"
# Stands before and after a value while JSON is spelled.
BEGIN, END = "\ue000", "\ue001"

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")

Form = dict[str, "str | Form"]


@dataclass(frozen=True)
class NameShares:
    """How names are drawn.

    Attributes:
        first: How often a name is the first of its kind.
        known: How often it is any of its kind; the rest are one or two words of `pieces` at random.
        pieces: What such words are made of.
    """

    first: float
    known: float
    pieces: tuple[str, ...] = LETTERS


NAME_SHARES = NameShares(first=0.3, known=0.4)


@dataclass(frozen=True)
class Spelled:
    """JSON as text.

    Attributes:
        text: The characters.
        known: For each of them whether it follows from the image: values and what ends them.
    """

    text: str
    known: list[bool]


def draw_form(rng: np.random.Generator, max_fields: int = 3, depth: int = 1, shares: NameShares = NAME_SHARES) -> Form:
    """Draw names and types of one to `max_fields` fields; now and then one of them is an object."""
    form: Form = {}
    for _ in range(int(rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))):
        if len(form) == max_fields:
            break
        if depth and rng.random() < 0.12:
            form[draw_name(rng, OBJECT_NAMES, shares)] = draw_form(rng, 2, depth - 1, shares)
            continue
        kind = str(rng.choice(TYPES, p=TYPE_SHARES))
        names = NAMES[kind]
        if kind == INTEGER and rng.random() < 0.3:
            names = FIRST_NAMES + LAST_NAMES
        form[draw_name(rng, names, shares)] = kind
    return form


def draw_name(rng: np.random.Generator, names: tuple[str, ...], shares: NameShares = NAME_SHARES) -> str:
    """Draw one of these names, or one that nobody has seen."""
    chance = rng.random()
    if chance < shares.first:
        return names[0]
    if chance < shares.first + shares.known:
        return names[int(rng.integers(len(names)))]
    words = ["".join(rng.choice(shares.pieces, int(rng.integers(2, 8)))) for _ in range(int(rng.integers(1, 3)))]
    word = "_".join(words)
    return word.capitalize() if rng.random() < 0.15 else word


def fill_form(form: Form, text: str) -> dict[str, Any]:
    """Return the object that says of this form what an image shows; `text` are its digits, as in an answer."""
    return {
        name: fill_form(kind, text) if isinstance(kind, dict) else value_of(name, kind, text)
        for name, kind in form.items()
    }


def value_of(name: str, kind: str, text: str) -> Any:
    """Return the value of one field."""
    digits = text.split()
    if kind == STRING:
        return text
    if kind == STRINGS:
        return digits
    if kind == INTEGERS:
        return [int(digit) for digit in digits]
    if name in FIRST_NAMES:
        return int(digits[0])
    return int(digits[-1]) if name in LAST_NAMES else len(digits)


def spell_form(filled: dict[str, Any], separators: tuple[str, str] = SPACED, indent: int | None = None) -> Spelled:
    """Spell a filled form as JSON, with one of the ways to write blanks that a server's grammar may force."""
    marked = json.dumps(_mark(filled), separators=separators, indent=indent, ensure_ascii=False)
    # Numbers were marked as strings: those quotes go.
    marked = marked.replace(f'"{BEGIN}{BEGIN}', BEGIN).replace(f'{END}{END}"', END)
    # Of a list the brackets and what stands between values are known too.
    marked = re.sub(r"\[[^]]*\]", lambda found: BEGIN + re.sub(f"[{BEGIN}{END}]", "", found[0]) + END, marked)
    text, known, inside = [], [], 0
    for letter in marked:
        if letter == BEGIN:
            inside = 1
        elif letter == END:
            inside = 2
        else:
            text.append(letter)
            known.append(inside > 0)
            if inside == 2 and letter not in " \n":
                inside = 0  # what follows a value tells that it has ended
    known[-1] = True
    return Spelled("".join(text), known)


def _mark(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _mark(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_mark(inner) for inner in value]
    return f"{BEGIN}{value}{END}" if isinstance(value, str) else f"{BEGIN}{BEGIN}{value}{END}{END}"


def schema_of(form: Form) -> dict[str, Any]:
    """Return the JSON schema that has exactly these fields, as the SDKs write it."""
    return {
        "type": "object",
        "properties": {
            name: schema_of(kind) if isinstance(kind, dict) else _schema(kind) for name, kind in form.items()
        },
        "required": list(form),
        "additionalProperties": False,
    }


def _schema(kind: str) -> dict[str, Any]:
    return {"type": "array", "items": {"type": kind.strip("[]")}} if kind.startswith("[") else {"type": kind}


def spell_pieces(rng: np.random.Generator, spell: Callable[[str], tuple[int, ...]], text: str) -> tuple[int, ...]:
    """Return ids of a text cut at random places: a grammar's text may come in any pieces."""
    ids: list[int] = []
    while text:
        length = int(rng.integers(1, 6))
        ids += spell(text[:length])
        text = text[length:]
    return tuple(ids)
