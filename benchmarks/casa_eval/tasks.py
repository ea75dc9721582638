"""The nine tasks of Kyutai's evaluation: where each set comes from, its prompt, its metric, its summary.

Source: kyutai-labs/casa, scripts/eval.py and run_all_evals.sh. Where that differs from lmms-eval: docs/evaluation.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from casa_engine.errors import InputError
from casa_eval import metrics

# The columns of a row that a task asks for, without its image: texts, and lists of texts.
Fields = Mapping[str, Any]
IMAGE = "image"
# A question, a choice, a reference. The longest of the published sets have a few hundred; scoring is quadratic in it.
MAX_TEXT_CHARACTERS = 10_000
MAX_TEXTS = 200
ONE_WORD = "\nAnswer the question using a single word or phrase."
DIRECTLY = "\nPlease directly answer the question."
WITH_LETTER = "\nAnswer with the letter."
PERCEPTION = frozenset(
    ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
)


@dataclass(frozen=True)
class Outcome:
    """What a summary needs of an answered sample.

    Attributes:
        score: 0..1.
        group: Part of the set that it belongs to, "" where there are none.
        pair: In MME, the image, about which there are two questions.
    """

    score: float
    group: str = ""
    pair: str = ""


def mean_summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the mean score in percent, of all and of each group."""
    groups: dict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.group].append(outcome.score)
    by_group = {group: percent(scores) for group, scores in sorted(groups.items()) if group}
    figures = {"score": percent(outcome.score for outcome in outcomes)}
    return figures | ({"groups": by_group} if by_group else {})


def ocrbench_summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Return `mean_summary`, and the score out of 1,000 in which OCRBench is usually quoted."""
    figures = mean_summary(outcomes)
    return figures | {"out_of_1000": None if figures["score"] is None else 10 * figures["score"]}


def mme_summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Return MME's totals: of each category, the percentage of right answers and that of images with both right.

    An image without exactly two answered questions counts nothing, and is counted in `unpaired`.
    """
    pairs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for outcome in outcomes:
        pairs[outcome.group, outcome.pair].append(outcome.score)
    categories: dict[str, list[float]] = defaultdict(list)
    unpaired = 0
    for (category, _), scores in pairs.items():
        if len(scores) == 2:
            categories[category].append(100 * sum(scores) / 2 + 100 * (sum(scores) == 2))
        else:
            unpaired += 1
    means = {category: sum(scores) / len(scores) for category, scores in sorted(categories.items())}
    perception = sum(score for category, score in means.items() if category in PERCEPTION)
    cognition = sum(score for category, score in means.items() if category not in PERCEPTION)
    totals = (perception + cognition, perception, cognition) if means else (None, None, None)
    return dict(zip(("score", "perception", "cognition"), totals, strict=True)) | {
        "groups": means,
        "unpaired": unpaired,
    }


def percent(scores: Iterable[float]) -> float | None:
    """Return the mean of scores times 100, None of nothing."""
    scores = list(scores)
    return 100 * sum(scores) / len(scores) if scores else None


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: As in Kyutai's script.
        title: For tables.
        source: The data set on the hub.
        split: The part of it that is asked.
        metric: For tables.
        texts: Columns that hold a text.
        lists: Columns that hold a list of texts.
        prompt: The question as the model gets it.
        references: The right answers.
        score: Of an answer, 0..1.
        config: The folder of the data set, where it has several.
        images: Folder and key of a second table with the images, and the column that names the key.
        group: Column that names the part of the set that a sample belongs to.
        pair: Column that names what two questions belong to.
        summarize: Figures of all outcomes; `score` is that of the table.
    """

    name: str
    title: str
    source: str
    split: str
    metric: str
    texts: tuple[str, ...]
    prompt: Callable[[Fields], str]
    references: Callable[[Fields], list[str]]
    score: Callable[[str, Fields], float]
    lists: tuple[str, ...] = ()
    config: str | None = None
    images: tuple[str, str, str] | None = None
    group: str | None = None
    pair: str | None = None
    summarize: Callable[[list[Outcome]], dict[str, Any]] = field(default=mean_summary)

    def read_fields(self, row: Mapping[str, Any]) -> Fields:
        """Return the texts of a row.

        Raises:
            InputError: One is missing, of another type or too long.
        """
        fields: dict[str, Any] = {name: as_text(name, row.get(name)) for name in self.texts}
        for name in self.lists:
            given = row.get(name)
            words = [given] if isinstance(given, str) else given
            if not isinstance(words, list) or not 1 <= len(words) <= MAX_TEXTS:
                got = f"{len(words)} entries" if isinstance(words, list) else type(given).__name__
                raise InputError(f"{name} is {got}; expected a list of 1 to {MAX_TEXTS} texts.")
            fields[name] = [as_text(name, word) for word in words]
        return fields

    def outcome(self, score: float, fields: Fields) -> Outcome:
        """Return what the summary needs of a sample."""
        group, pair = (fields[name] if name else "" for name in (self.group, self.pair))
        return Outcome(score, group, pair)


def as_text(name: str, value: object) -> str:
    """Return a text of a row; a whole number is one.

    Raises:
        InputError: It is none, or too long.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise InputError(f"{name} is {type(value).__name__}; expected a text.")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise InputError(f"{name} has {len(value):,} characters; expected up to {MAX_TEXT_CHARACTERS:,}.")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{name} holds half of a surrogate pair, which is no character; expected a text.")
    return value


def asked_with(suffix: str) -> Callable[[Fields], str]:
    """Return a prompt: the question, then how to answer."""
    return lambda fields: fields["question"] + suffix


def mme_prompt(fields: Fields) -> str:
    """Return MME's prompt; the question keeps its own "Please answer yes or no."."""
    return fields["question"].strip() + ONE_WORD


def ai2d_prompt(fields: Fields) -> str:
    """Return AI2D's prompt, with a letter before each choice.

    Raises:
        InputError: The question is empty.
    """
    question = fields["question"]
    if not question.strip():
        raise InputError("question is empty; expected a text.")
    mark = "" if question.strip()[-1] in "?." else "?"
    choices = "\n".join(f"{letter_of(place)}. {choice}" for place, choice in enumerate(fields["options"]))
    return f"Question: {question}{mark}\nChoices:\n{choices}{WITH_LETTER}"


def letter_of(place: int) -> str:
    """Return the letter of a choice; 0 is A."""
    return chr(ord("A") + place)


def one(name: str) -> Callable[[Fields], list[str]]:
    """Return the references of a set with one right answer."""
    return lambda fields: [fields[name]]


def ai2d_references(fields: Fields) -> list[str]:
    """Return the letter of the right choice.

    Raises:
        InputError: The answer is not the number of a choice.
    """
    number = fields["answer"].strip()
    if number not in map(str, range(min(len(fields["options"]), 26))):
        raise InputError(f"answer is {number[:40]!r}; expected the number of one of {len(fields['options'])} choices.")
    return [letter_of(int(number))]


def mme_references(fields: Fields) -> list[str]:
    """Return "yes" or "no".

    Raises:
        InputError: The answer is neither.
    """
    right = fields["answer"].lower().strip().replace(".", "")
    if right not in ("yes", "no"):
        raise InputError(f"answer is {right[:40]!r}; expected yes or no.")
    return [right]


def without_last_period(answer: str) -> str:
    """Return an answer without full stops at its end, which Kyutai's models tend to add."""
    return answer.rstrip(".")


def chartqa_score(answer: str, fields: Fields) -> float:
    """See `metrics.relaxed_accuracy`."""
    return metrics.relaxed_accuracy(without_last_period(answer), fields["answer"])


def textvqa_score(answer: str, fields: Fields) -> float:
    """See `metrics.vqa_accuracy`."""
    return metrics.vqa_accuracy(answer, fields["answers"])


def realworldqa_score(answer: str, fields: Fields) -> float:
    """See `metrics.exact_match`."""
    return metrics.exact_match(without_last_period(without_last_period(answer).strip()), fields["answer"])


def ocrbench_score(answer: str, fields: Fields) -> float:
    """See `metrics.contains_reference`."""
    is_formula = fields["dataset"] == "HME100k"
    return metrics.contains_reference(without_last_period(answer), fields["answer"], is_formula=is_formula)


def anls_score(answer: str, fields: Fields) -> float:
    """See `metrics.anls`."""
    return metrics.anls(without_last_period(answer).strip(), fields["answers"])


def gqa_score(answer: str, fields: Fields) -> float:
    """See `metrics.exact_match_without_punctuation`."""
    return metrics.exact_match_without_punctuation(answer, fields["answer"])


def mme_score(answer: str, fields: Fields) -> float:
    """See `metrics.yes_or_no`."""
    return float([metrics.yes_or_no(answer)] == mme_references(fields))


def ai2d_score(answer: str, fields: Fields) -> float:
    """See `metrics.chosen_letter`."""
    return float([metrics.chosen_letter(answer.removeprefix("Answer: "))] == ai2d_references(fields))


def documents(name: str, config: str) -> Task:
    """Return one of the two tasks of the data set of documents."""
    return Task(
        name,
        config,
        "lmms-lab/DocVQA",
        "validation",
        "ANLS*",
        ("question",),
        asked_with(ONE_WORD),
        lambda fields: fields["answers"],
        anls_score,
        lists=("answers",),
        config=config,
    )


# In the order of Kyutai's tables.
TASKS = {
    task.name: task
    for task in (
        Task(
            "chartqa",
            "ChartQA",
            "lmms-lab/ChartQA",
            "test",
            "relaxed accuracy",
            ("question", "answer", "type"),
            asked_with(ONE_WORD),
            one("answer"),
            chartqa_score,
            group="type",
        ),
        documents("docvqa", "DocVQA"),
        documents("infographic_vqa", "InfographicVQA"),
        Task(
            "ocrbench",
            "OCRBench",
            "echo840/OCRBench",
            "test",
            "accuracy",
            ("question", "dataset", "question_type"),
            asked_with(DIRECTLY),
            lambda fields: fields["answer"],
            ocrbench_score,
            lists=("answer",),
            group="question_type",
            summarize=ocrbench_summary,
        ),
        Task(
            "textvqa",
            "TextVQA",
            "lmms-lab/textvqa",
            "validation",
            "VQA accuracy",
            ("question",),
            asked_with(ONE_WORD),
            lambda fields: fields["answers"],
            textvqa_score,
            lists=("answers",),
        ),
        Task(
            "realworldqa",
            "RealWorldQA",
            "lmms-lab/RealWorldQA",
            "test",
            "exact match",
            ("question", "answer"),
            asked_with(ONE_WORD),
            one("answer"),
            realworldqa_score,
        ),
        Task(
            "ai2d",
            "AI2D",
            "lmms-lab/ai2d",
            "test",
            "letter",
            ("question", "answer"),
            ai2d_prompt,
            ai2d_references,
            ai2d_score,
            lists=("options",),
        ),
        Task(
            "gqa",
            "GQA",
            "lmms-lab/GQA",
            "testdev",
            "exact match",
            ("question", "answer"),
            asked_with(ONE_WORD),
            one("answer"),
            gqa_score,
            config="testdev_balanced_instructions",
            images=("testdev_balanced_images", "id", "imageId"),
        ),
        Task(
            "mme",
            "MME",
            "lmms-lab/MME",
            "test",
            "total",
            ("question", "answer", "category", "question_id"),
            mme_prompt,
            mme_references,
            mme_score,
            group="category",
            pair="question_id",
            summarize=mme_summary,
        ),
    )
}
