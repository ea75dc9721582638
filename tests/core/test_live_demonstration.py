"""What a checkpoint says about itself is read whole or refused with its reason."""

import json

import pytest

from casa_digits.demonstration import DEMONSTRATION, write_demonstration
from casa_engine.digits import checkpoint_path
from casa_engine.errors import CheckpointError
from casa_engine.live.demonstration import DEMONSTRATION_FILE, MAX_CHARACTERS, MAX_QUESTIONS, Demonstration

pytestmark = pytest.mark.unit


def test_the_embedded_checkpoint_has_what_its_training_writes(tmp_path):
    write_demonstration(tmp_path)
    assert (tmp_path / DEMONSTRATION_FILE).read_bytes() == (checkpoint_path() / DEMONSTRATION_FILE).read_bytes()
    demonstration = Demonstration.for_checkpoint(tmp_path)
    assert demonstration == Demonstration(DEMONSTRATION["reads"], tuple(DEMONSTRATION["questions"]))


def test_a_checkpoint_need_not_say_anything(tmp_path):
    assert Demonstration.for_checkpoint(tmp_path) == Demonstration()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "fields reads and questions"),
        (json.dumps({"reads": "a"}), "fields reads and questions"),
        (json.dumps({"reads": "a", "questions": [], "more": 1}), "fields reads and questions"),
        (json.dumps({"reads": 1, "questions": []}), "reads in"),
        (json.dumps({"reads": "a" * (MAX_CHARACTERS + 1), "questions": []}), "reads in"),
        (json.dumps({"reads": "a", "questions": "b"}), "expected a list"),
        (json.dumps({"reads": "a", "questions": ["b"] * (MAX_QUESTIONS + 1)}), "expected a list"),
        (json.dumps({"reads": "a", "questions": [" "]}), "questions in"),
        (json.dumps({"reads": "a", "questions": [None]}), "questions in"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, content, words):
    (tmp_path / DEMONSTRATION_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=words):
        Demonstration.for_checkpoint(tmp_path)
