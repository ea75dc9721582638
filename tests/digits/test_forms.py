"""JSON as the training spells it: JSON indeed, and what of it an image tells."""

import json

import numpy as np
import pytest

from casa_digits.forms import COMPACT, SPACED, draw_form, fill_form, schema_of, spell_form, spell_pieces

pytestmark = pytest.mark.unit

STYLES = [(SPACED, None), (COMPACT, None), ((",", ": "), 2)]
NESTED = {"digits": [3, 7, 1], "result": {"text": "3 7 1", "first": 3}, "texts": ["3", "7"], "count": 3}


@pytest.mark.parametrize(("separators", "indent"), STYLES)
def test_forms_are_spelled_as_json_spells_them(separators, indent):
    rng = np.random.default_rng(0)
    drawn = [fill_form(draw_form(rng), "3 7 1") for _ in range(200)]
    assert any(isinstance(value, dict) for filled in drawn for value in filled.values())
    for filled in [*drawn, NESTED, {"digits": [3]}, {"a": {"b": {"c": 1}}}, {"text": "3"}]:
        spelled = spell_form(filled, separators, indent)
        assert spelled.text == json.dumps(filled, separators=separators, indent=indent)
        assert len(spelled.known) == len(spelled.text)


@pytest.mark.parametrize(
    ("filled", "style", "told"),
    [
        ({"count": 3}, STYLES[0], '{"count": ^^'),
        ({"digits": [3, 7], "n": 2}, STYLES[0], '{"digits": ^^^^^^^ "n": ^^'),
        ({"text": "3 7", "n": 2}, STYLES[1], '{"text":"^^^^,"n":^^'),
        ({"a": {"b": 1}, "c": 2}, STYLES[0], '{"a": {"b": ^^, "c": ^^'),
        ({"a": {"b": ["3"]}}, STYLES[1], '{"a":{"b":^^^^^^^'),
        ({"digits": [3]}, STYLES[2], '{\n  "digits": ^^^^^^^^^^^^^'),
        ({}, STYLES[0], "{^"),
    ],
)
def test_an_image_tells_values_and_what_ends_them(filled, style, told):
    spelled = spell_form(filled, *style)
    assert "".join("^" if known else letter for letter, known in zip(spelled.text, spelled.known, strict=True)) == told


def test_values_follow_from_names_and_types():
    text = "3 7 1"
    form = {"n": "integer", "first": "integer", "last": "integer", "x": "[integer]", "y": "[string]", "z": "string"}
    assert fill_form({**form, "in": {"n": "integer"}}, text) == {
        "n": 3,
        "first": 3,
        "last": 1,
        "x": [3, 7, 1],
        "y": ["3", "7", "1"],
        "z": text,
        "in": {"n": 3},
    }


def test_a_schema_has_the_fields_of_its_form():
    schema = schema_of({"x": "[integer]", "in": {"n": "integer"}})
    inner = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    assert schema["properties"] == {"x": {"type": "array", "items": {"type": "integer"}}, "in": inner}
    assert schema["required"] == ["x", "in"] and not schema["additionalProperties"]


def test_pieces_of_a_text_are_the_text():
    text = '{"digits": [3, 7, 1]}'
    assert "".join(spell_pieces(np.random.default_rng(0), tuple, text)) == text
