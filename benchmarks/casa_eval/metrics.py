"""The score of one answer, 0..1, for each kind of metric. What a task does to an answer before is in `tasks.py`.

Each is written from its definition; tests/evaluation compares them with lmms-eval's own. ANLS is that of the ANLS*
paper (arXiv 2402.03848), which Kyutai's script uses.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from casa_eval.vqa_answers import normal_form

# ChartQA (arXiv 2203.10244, section 5.1): a number may be off by so much of the right one.
MAX_RELATIVE_ERROR = 0.05
# ANLS: what is less alike than this is wrong.
MIN_SIMILARITY = 0.5
# TextVQA: an answer that so many of the other people gave is right.
AGREEING_PEOPLE = 3
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Full-width forms of ASCII, and the ideographic blank.
NARROW = {0xFF01 + offset: 0x21 + offset for offset in range(0x5E)} | {0x3000: 0x20}
LETTER = re.compile(r"\s*([A-Z])\.")


def relaxed_accuracy(answer: str, reference: str) -> float:
    """Return ChartQA's score: numbers within 5%, other words equal but for their case."""
    said, right = as_number(answer), as_number(reference)
    # Nothing is within 5% of zero: "0" is compared as a word.
    if said is None or not right:
        return float(answer.lower() == reference.lower())
    return float(abs(said - right) / abs(right) <= MAX_RELATIVE_ERROR)


def as_number(words: str) -> float | None:
    """Return the number that words are, of percentages a hundredth; None where they are none."""
    try:
        return float(words.rstrip("%")) / 100 if words.endswith("%") else float(words)
    except ValueError:
        return None


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the VQA challenge's score: each person in turn is left out, and three of the others must agree."""
    said, given = normal_form(answer), [normal_form(each) for each in references]
    agreeing = given.count(said)
    if not given:
        return 0.0
    scores = [min(1.0, (agreeing - (each == said)) / AGREEING_PEOPLE) for each in given]
    return sum(scores) / len(scores)


def exact_match(answer: str, reference: str) -> float:
    """Return 1 where both are equal but for case and the reference's outer blanks."""
    return float(answer.lower() == reference.lower().strip())


def exact_match_without_punctuation(answer: str, reference: str) -> float:
    """Return 1 where both are equal but for case, outer blanks and ASCII punctuation (GQA)."""
    said, right = (each.strip().lower().translate(NO_PUNCTUATION) for each in (answer, reference))
    return float(said == right)


def contains_reference(answer: str, references: Sequence[str], *, is_formula: bool) -> float:
    """Return OCRBench's score: 1 where any reference stands in the answer.

    Args:
        answer: What the model said.
        references: Right answers.
        is_formula: Whether it is a handwritten formula (HME100k): case counts and blanks do not.
    """

    def shown(text: str) -> str:
        if is_formula:
            return text.strip().replace("\n", " ").replace(" ", "")
        return text.translate(NARROW).lower().strip().replace("\n", " ")

    said = shown(answer.strip())
    return float(any(shown(each) in said for each in references))


def anls(answer: str, references: Sequence[str]) -> float:
    """Return the likeness to the nearest reference: 1 less the edit distance over the longer one's length.

    Case and the number of blanks do not count; what is less than half alike is 0.
    """
    said = _one_line(answer)
    # What is less than half as long is less than half alike.
    near = [each for each in map(_one_line, references) if 2 * min(len(said), len(each)) >= max(len(said), len(each))]
    likeness = max((_likeness(said, each) for each in near), default=0.0)
    return likeness if likeness >= MIN_SIMILARITY else 0.0


def _one_line(text: str) -> str:
    return " ".join(text.strip().lower().split())


def _likeness(said: str, right: str) -> float:
    longest = max(len(said), len(right))
    return 1 - edit_distance(said, right) / longest if longest else 1.0


def edit_distance(left: str, right: str) -> int:
    """Return the smallest number of letters to insert, delete or replace that makes one text of another."""
    row = list(range(len(right) + 1))
    for number, letter in enumerate(left, start=1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(right, start=1):
            replaced = diagonal + (letter != other)
            diagonal = row[place]
            row[place] = min(replaced, diagonal + 1, row[place - 1] + 1)
    return row[-1]


def yes_or_no(answer: str) -> str:
    """Return what MME reads in an answer: "yes", "no" or "other"; only the first four letters count."""
    said = answer.lower().strip().replace(".", "")
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said, "other")
    return next((word for word in ("yes", "no") if word in said[:4]), "other")


def chosen_letter(answer: str) -> str:
    """Return the letter of the choice that an answer begins with ("B. cat"), or the answer where it does not (AI2D)."""
    found = LETTER.match(answer)
    return found[1] if found else answer
