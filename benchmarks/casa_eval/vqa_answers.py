"""Answers in the normal form of the VQA challenge, in which TextVQA compares them.

Lower case, digits for number words, no articles, no punctuation, and the apostrophes of contractions put back.
Source: the challenge's evaluation (visualqa.org/evaluation.html), as lmms-eval 0.7.3 applies it.
"""

from __future__ import annotations

import re

NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number) for number, word in enumerate("one two three four five six seven eight nine ten".split(), start=1)
}
ARTICLES = frozenset(("a", "an", "the"))
# A mark is deleted where it stands beside a blank anywhere in the answer, otherwise it becomes a blank.
MARKS = ';/[]"{}()=+\\_-><@`!'
# Not before a digit: "3.5" stays, "5." does not.
PERIOD = re.compile(r"\.(?!\d)")
# The challenge's code passes re.UNICODE, which is 32, in the place of the number of replacements.
MAX_PERIODS = int(re.UNICODE)
CONTRACTIONS_IN_FULL = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def without_one_apostrophe(word: str) -> list[str]:
    """Return the spellings of a word that lack one of its apostrophes."""
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {short: word for word in CONTRACTIONS_IN_FULL for short in without_one_apostrophe(word)} | {
    # The challenge's exception.
    "somebody'd": "somebodyd",
}


def normal_form(answer: str) -> str:
    """Return an answer as the VQA challenge compares it."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    shown = text
    for mark in MARKS:
        is_apart = f"{mark} " in shown or f" {mark}" in shown
        text = text.replace(mark, "" if is_apart else " ")
    text = PERIOD.sub("", text, count=MAX_PERIODS)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
