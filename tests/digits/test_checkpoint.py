"""The shipped weights read held-out digits. `casa-eval-digits` does the same with the full number of images."""

import json

import pytest

from casa_digits.evaluate import evaluate_eager
from casa_engine.digits import checkpoint_path

MAX_BYTES = 10_000_000


@pytest.fixture(scope="module")
def report():
    return evaluate_eager(checkpoint_path(), scale=0.3, seed=11)


@pytest.mark.parametrize("name", ["read", "second", "count", "first", "stream: changes", "stream: repeated"])
def test_held_out_digits_are_read(report, name):
    (score,) = [score for score in report.scores if score.name == name]
    assert score.passed, report.table()


def test_weights_are_small_and_their_accuracy_is_recorded():
    assert (checkpoint_path() / "model.safetensors").stat().st_size <= MAX_BYTES
    record = json.loads((checkpoint_path() / "accuracy.json").read_text())
    assert record["command"].startswith("casa-train-digits") and record["held_out"]["read"] >= 0.9
