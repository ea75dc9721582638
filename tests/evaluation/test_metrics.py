"""The metrics of `casa eval`: equal to lmms-eval's on a table of cases, and to the protocol where that differs."""

import json
from collections import Counter
from pathlib import Path

import pytest

from casa_eval import metrics
from casa_eval.target import default_system_prompt, question
from casa_eval.tasks import TASKS, Outcome, mme_summary

pytestmark = pytest.mark.unit
# Written by tests/support/eval_metric_cases.py in an environment with lmms-eval; test_lmms_eval.py compares it again.
HEAD, *TABLE = json.loads((Path(__file__).parent / "metric_cases.json").read_text())
FEW = {"question": "What?"}


@pytest.mark.parametrize("metric", ["chartqa", "realworldqa", "gqa", "textvqa", "docvqa", "ocrbench", "ai2d", "mme"])
def test_scores_are_those_of_lmms_eval(metric):
    assert HEAD == {"made by": "lmms-eval 0.7.3"}
    own = [case for case in TABLE if case[0] == metric]
    wrong = [
        (answer, fields, expected)
        for _, answer, fields, expected in own
        if TASKS[metric].score(answer, fields) != pytest.approx(expected, abs=1e-8)
    ]
    assert not wrong[:5]
    right = Counter(expected >= 0.5 for *_, expected in own)
    assert right[True] >= 9
    assert right[False] >= 9


@pytest.mark.parametrize(
    ("task", "answer", "fields", "score"),
    [
        # A full stop at the end is no part of the answer.
        ("chartqa", "5.", {"answer": "5"}, 1),
        ("chartqa", "Cat...", {"answer": "cat"}, 1),
        ("realworldqa", "B.", {"answer": "B"}, 1),
        ("realworldqa", "Downhill. ", {"answer": "downhill"}, 1),
        # lmms-eval finds the letter since April 2026; the protocol of the published scores does not.
        ("realworldqa", "(B)", {"answer": "B"}, 0),
        ("docvqa", "5.", {"answers": ["5"]}, 1),
        ("infographic_vqa", "a cat.", {"answers": ["dog", "A  Cat"]}, 1),
        # ANLS* divides by the length without the blanks that are no part of the distance.
        ("docvqa", "abcd", {"answers": ["ab        xy"]}, 0),
        ("docvqa", "abcde", {"answers": ["abcxx "]}, 0.6),
        ("docvqa", "", {"answers": [""]}, 1),
        ("gqa", " Yes. ", {"answer": "yes"}, 1),
        ("ai2d", "Answer: B. cat", {"answer": "1", "options": ["a", "b"]}, 1),
        ("ai2d", "B", {"answer": "1", "options": ["a", "b"]}, 1),
        ("ai2d", "B.", {"answer": "1", "options": ["a", "b"]}, 1),
        ("ai2d", "(B)", {"answer": "1", "options": ["a", "b"]}, 0),
        ("ai2d", "b", {"answer": "1", "options": ["a", "b"]}, 0),
    ],
)
def test_scores_where_the_protocol_speaks(task, answer, fields, score):
    assert TASKS[task].score(answer, fields) == pytest.approx(score)


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edit_distance(left, right, distance):
    assert metrics.edit_distance(left, right) == metrics.edit_distance(right, left) == distance


def test_mme_adds_the_share_of_images_with_both_right():
    answered = [("OCR", "1", 1), ("OCR", "1", 1), ("OCR", "2", 1), ("OCR", "2", 0)]
    answered += [("code_reasoning", "1", 0), ("code_reasoning", "1", 0), ("count", "9", 1), ("count", "9", 1)]
    figures = mme_summary([Outcome(score, group, pair) for group, pair, score in answered])
    # OCR: 75 of the answers, 50 of the images.
    assert figures["groups"] == {"OCR": 125, "code_reasoning": 0, "count": 200}
    assert (figures["score"], figures["perception"], figures["cognition"]) == (325, 325, 0)
    assert figures["unpaired"] == 0
    lonely = mme_summary([Outcome(1, "OCR", "1"), Outcome(1, "count", "9"), Outcome(1, "count", "9")])
    assert (lonely["score"], lonely["unpaired"]) == (200, 1)
    assert mme_summary([])["score"] is None


def test_summaries_are_means_in_percent():
    figures = TASKS["ocrbench"].summarize([Outcome(1, "a"), Outcome(0, "b"), Outcome(1, "b"), Outcome(1, "b")])
    assert figures["score"] == 75
    assert figures["out_of_1000"] == 750
    assert figures["groups"] == {"a": 100, "b": pytest.approx(200 / 3)}
    assert TASKS["gqa"].summarize([]) == {"score": None}


@pytest.mark.parametrize(
    ("task", "fields", "prompt"),
    [
        ("chartqa", FEW, "What?\nAnswer the question using a single word or phrase."),
        ("textvqa", FEW, "What?\nAnswer the question using a single word or phrase."),
        ("realworldqa", FEW, "What?\nAnswer the question using a single word or phrase."),
        ("docvqa", FEW, "What?\nAnswer the question using a single word or phrase."),
        ("infographic_vqa", FEW, "What?\nAnswer the question using a single word or phrase."),
        ("gqa", FEW, "What?\nAnswer the question using a single word or phrase."),
        ("ocrbench", FEW, "What?\nPlease directly answer the question."),
        (
            "mme",
            {"question": " Is it? Please answer yes or no.\n"},
            "Is it? Please answer yes or no.\nAnswer the question using a single word or phrase.",
        ),
        (
            "ai2d",
            {"question": "Which", "options": ["x", "y"]},
            "Question: Which?\nChoices:\nA. x\nB. y\nAnswer with the letter.",
        ),
        ("ai2d", {"question": "Is. ", "options": ["x"]}, "Question: Is. \nChoices:\nA. x\nAnswer with the letter."),
    ],
)
def test_prompts_are_those_of_the_protocol(task, fields, prompt):
    assert TASKS[task].prompt(fields) == prompt


def test_models_named_qwen_get_a_system_prompt():
    (system, user) = question("What?", [], default_system_prompt("CASA-Qwen2_5-VL-3B"))
    assert system == {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]}
    assert user["role"] == "user"
    assert [message["role"] for message in question("What?", [], default_system_prompt("CASA-Helium1-VL-2B"))] == [
        "user"
    ]
