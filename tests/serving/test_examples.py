"""The examples that need a server, against the tests' server."""

import re

import pytest

from casa_digits.video import make_video
from example_programs import EXAMPLES, run_example

pytestmark = pytest.mark.vllm
TRUTH = {"digits.png": "0 7 0 9", "more_digits.png": "2 3 3"}


def test_chat_with_an_image(server, tmp_path):
    (answer,) = run_example("chat_with_image.py", "--base-url", f"{server.url}/v1", folder=tmp_path)
    assert answer == TRUTH["digits.png"]


def test_a_question_and_an_image_of_ones_own(server, tmp_path):
    options = [EXAMPLES / "more_digits.png", "--question", "How many digits are there?"]
    (answer,) = run_example("chat_with_image.py", *options, "--base-url", f"{server.url}/v1", folder=tmp_path)
    assert answer == str(len(TRUTH["more_digits.png"].split()))


def test_chat_about_images(server, tmp_path):
    lines = run_example("chat_about_images.py", "--base-url", f"{server.url}/v1", folder=tmp_path)
    first, second = TRUTH.values()
    assert lines == [f"digits.png: {first}", f"more_digits.png: {second}", f"What did you read first? {first}"]


def test_live_captions(server, tmp_path):
    truth = make_video(tmp_path / "digits.mp4", 8.0, 10)
    lines = run_example("live_captions.py", "digits.mp4", "--url", server.live_url, folder=tmp_path)
    *captions, answer, end = lines
    assert [line.partition("s  ")[2] for line in captions] == [span.text for span in truth]
    # Whether it remembers well is measured elsewhere (casa digits eval).
    assert re.fullmatch(r"What did you read first\? \d( \d)*", answer)
    assert end == f"16 frames, {16 - len(truth)} of them silent"


def test_every_example_is_in_the_table_and_run_by_a_test():
    table = (EXAMPLES / "README.md").read_text()
    tests = "".join(path.read_text() for path in EXAMPLES.parent.glob("tests/*/test_examples.py"))
    programs = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert len(programs) == 5
    for name in programs:
        assert f"| [{name}]({name}) |" in table
        assert f'run_example("{name}"' in tests
