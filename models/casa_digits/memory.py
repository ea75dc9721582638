"""Questions about what was read before, and what the text says to them, right or wrong."""

from collections.abc import Sequence

from casa_digits.phrases import BEFORE, CHANGES, FIRST, LAST, MANY, NOTHING

QUESTIONS = {"first": FIRST, "last": LAST, "before": BEFORE, "changes": CHANGES}
# In a chat every image is another one: how often it changed is asked of a video.
CHAT_QUESTIONS = ("first", "last", "before")
MAX_CHANGES = 9


def recall(kind: str, said: Sequence[str]) -> str:
    """Return the answer to one kind of question.

    Args:
        kind: A key of `QUESTIONS`.
        said: The readings that are still in the text, in order; of a video its captions.
    """
    if kind == "changes":
        changes = max(0, len(said) - 1)
        return str(changes) if changes <= MAX_CHANGES else MANY
    place, least = {"first": (0, 1), "last": (-1, 1), "before": (-2, 2)}[kind]
    return said[place] if len(said) >= least else NOTHING
