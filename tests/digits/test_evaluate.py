"""What the evaluation counts as right: what was seen and what was said, not luck."""

import pytest

from casa_digits.cases import draw_suites
from casa_digits.evaluate import run_suites

RECALLED = ("first", "last", "before")


class ReadsAll:
    """Answers every question of the chats rightly, by the truth."""

    def __init__(self, suites):
        self.turns = iter([turn for suite in suites for turns in suite.conversations for turn in turns])

    def answer(self, messages, tools=None):
        expected = next(self.turns).expected
        if isinstance(expected, str):
            return expected
        return [message["content"] for message in messages if message["role"] == "assistant"][expected]


class SaysTheSame:
    """Answers everything with the same words."""

    def answer(self, messages, tools=None):
        return "3"


@pytest.fixture(scope="module")
def suites():
    return draw_suites(seed=4, scale=0.3)


def test_right_answers_are_counted(suites):
    assert [score.share for score in run_suites(ReadsAll(suites), suites)] == [1.0] * len(suites)


def test_the_same_words_to_every_question_recall_nothing(suites):
    recalled = [suite for suite in suites if suite.name in RECALLED]
    assert [suite.name for suite in recalled] == list(RECALLED)
    assert [score.right for score in run_suites(SaysTheSame(), recalled)] == [0, 0, 0]


def test_readings_that_are_recalled_differ():
    """Otherwise one could be taken for another. Several hundred, as equal ones are rare."""
    for suite in draw_suites(seed=4, scale=5.0)[3:]:
        for *readings, question in suite.conversations:
            texts = [turn.image.text for turn in readings]
            assert len(texts) in (2, 3) and question.image is None
            assert len(set(texts)) == len(texts)
