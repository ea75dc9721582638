"""What a stage of training is made of: kinds of conversations and their shares, lengths, sizes of batches."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from casa_digits.conversations import Conversation, Writer
from casa_digits.frames import FramePool

STREAM_TOKENS = (70, 120, 240, 400, 680)
ROWS_DRAWN = {"chat": 160, "memory": 80, "stream": 32, "recall": 40, "form": 80, "tools": 48, "copies": 48}
# Shares of `STREAM_TOKENS`: without the shortest, and with it.
_LONG = (0.0, 0.5, 0.32, 0.13, 0.05)
_ALL = (0.2, 0.3, 0.3, 0.15, 0.05)


@dataclass(frozen=True)
class Lesson:
    """One part of a stage.

    Attributes:
        until: Share of the stage's steps at which it ends.
        kinds: Share of each kind of conversation: methods of the writer, and `recall`, a stream of text alone.
        stream_tokens: Share of each of `STREAM_TOKENS` among streams.
        recall_tokens: The same for streams of text alone.
    """

    until: float
    kinds: dict[str, float]
    stream_tokens: tuple[float, ...] = _LONG
    recall_tokens: tuple[float, ...] = _ALL


@dataclass(frozen=True)
class Course:
    """One stage.

    Attributes:
        name: What it is called in messages and in the file of --progress.
        lessons: In order; the last one ends at 1.
        batch_tokens: Most tokens of a batch, padding included (a longer conversation is a batch of its own).
        steps_per_pool: Steps between two pools of images.
        peak_rate: Highest learning rate.
        note_layer: After how many layers a token should know what `Conversation.notes` says; None: that is not taught.
    """

    name: str
    lessons: tuple[Lesson, ...]
    batch_tokens: int
    steps_per_pool: int
    peak_rate: float
    note_layer: int | None = None

    def lesson(self, done: float) -> Lesson:
        """Return the lesson that belongs to a share of the steps done."""
        return next(lesson for lesson in self.lessons if done < lesson.until or lesson is self.lessons[-1])


LANGUAGE = Course(
    name="language",
    lessons=(
        Lesson(
            until=1.0,
            kinds={"chat": 0.18, "memory": 0.12, "stream": 0.3, "recall": 0.14, "form": 0.14, "tools": 0.12},
            recall_tokens=_LONG,
        ),
    ),
    batch_tokens=1600,
    steps_per_pool=500,
    peak_rate=2e-3,
)
# Short streams first, most of them text alone: finding what was said is learned where there is little to search.
_BEGUN = {"chat": 0.04, "memory": 0.08, "stream": 0.1, "recall": 0.6, "form": 0.04, "tools": 0.14}
_MIXED = {"chat": 0.07, "memory": 0.1, "stream": 0.34, "recall": 0.2, "form": 0.09, "tools": 0.2}
MEMORY = Course(
    name="memory",
    lessons=(
        Lesson(0.1, _BEGUN, recall_tokens=(0.6, 0.3, 0.1, 0.0, 0.0)),
        Lesson(0.25, _BEGUN, recall_tokens=(0.35, 0.35, 0.2, 0.1, 0.0)),
        Lesson(1.0, _MIXED),
    ),
    batch_tokens=640,
    steps_per_pool=1500,
    peak_rate=1.2e-3,
    note_layer=3,
)
# The hardest once more, and copying without any image: names were learned by heart instead of read.
FINISH = Course(
    name="finish",
    lessons=(
        Lesson(
            until=0.4,
            kinds={
                "chat": 0.04,
                "memory": 0.08,
                "stream": 0.2,
                "recall": 0.14,
                "form": 0.08,
                "tools": 0.22,
                "copies": 0.24,
            },
        ),
        Lesson(
            until=1.0,
            kinds={
                "chat": 0.06,
                "memory": 0.1,
                "stream": 0.34,
                "recall": 0.14,
                "form": 0.12,
                "tools": 0.18,
                "copies": 0.06,
            },
        ),
    ),
    batch_tokens=640,
    steps_per_pool=1500,
    peak_rate=1e-3,
    note_layer=3,
)
RESUME = dataclasses.replace(FINISH, name="resume", lessons=FINISH.lessons[-1:], peak_rate=6e-4)
# Names that stand before the image: only SA finds them, as it finds what was said in frames of the past.
NAMES = dataclasses.replace(
    FINISH,
    name="names",
    lessons=(
        Lesson(
            until=0.5,
            kinds={
                "chat": 0.04,
                "memory": 0.06,
                "stream": 0.16,
                "recall": 0.1,
                "form": 0.1,
                "tools": 0.2,
                "copies": 0.34,
            },
        ),
        Lesson(
            until=1.0,
            kinds={
                "chat": 0.08,
                "memory": 0.08,
                "stream": 0.28,
                "recall": 0.12,
                "form": 0.14,
                "tools": 0.2,
                "copies": 0.1,
            },
        ),
    ),
    peak_rate=8e-4,
)


def draw_batches(
    rng: np.random.Generator, writer: Writer, pool: FramePool, course: Course, lesson: Lesson
) -> Iterator[list[Conversation]]:
    """Draw rows of one kind in plenty and sort them, so that those of a batch have similar lengths."""
    kind = str(rng.choice(list(lesson.kinds), p=list(lesson.kinds.values())))
    if kind in ("stream", "recall"):
        shares = lesson.recall_tokens if kind == "recall" else lesson.stream_tokens
        lengths = rng.choice(STREAM_TOKENS, ROWS_DRAWN[kind], p=shares)
        rows = [writer.stream(pool, int(length), text_only=kind == "recall") for length in lengths]
    else:
        rows = [getattr(writer, kind)(pool) for _ in range(ROWS_DRAWN[kind])]
    yield from split_rows(sorted(rows, key=lambda row: len(row.ids)), course.batch_tokens)


def split_rows(rows: list[Conversation], batch_tokens: int) -> Iterator[list[Conversation]]:
    """Cut rows of ascending length into batches of at most `batch_tokens`, padding included."""
    while rows:
        count = 1
        while count < len(rows) and (count + 1) * len(rows[count].ids) <= batch_tokens:
            count += 1
        yield rows[:count]
        rows = rows[count:]
