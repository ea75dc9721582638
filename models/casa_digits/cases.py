"""What casa-tiny-digits is judged on: conversations about images of held-out digits, the same for every runner."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from casa_digits import phrases
from casa_digits.augment import camera_noise
from casa_digits.data import DigitImage, draw_grid, draw_image, load_samples
from casa_digits.forms import INTEGER, INTEGERS, STRING, Form, fill_form, schema_of

# Each question in the first of the words in which it was practised.
READ, COUNT = phrases.READ[0], phrases.COUNT[0]
FIRST, LAST, BEFORE = phrases.FIRST[0], phrases.LAST[0], phrases.BEFORE[0]
READ_JSON, COUNT_JSON, REPORT = phrases.READ_JSON[0], phrases.COUNT_JSON[0], phrases.REPORT[0]
# What clients ask for: one value, a list, a text, several, one within another; names that the training has not drawn.
FORMS: tuple[Form, ...] = (
    {"count": INTEGER},
    {"digits": INTEGERS},
    {"text": STRING},
    {"digits": INTEGERS, "count": INTEGER},
    {"result": {"count": INTEGER, "digits": INTEGERS}},
    {"how_many_are_there": INTEGER},
    {"seen_in_picture": INTEGERS},
)
TOOLS: tuple[tuple[str, Form], ...] = (
    ("report", {"digits": INTEGERS}),
    ("report", {"count": INTEGER}),
    ("final_result", {"response": INTEGERS}),
    ("write_down", {"text": STRING}),
    ("save_reading", {"digits": INTEGERS, "count": INTEGER}),
)
TOOL_RESULT = "ok"
NUM_FRAMES_ASKED = (4, 8, 16, 40, 60)


@dataclass(frozen=True)
class Turn:
    """One question.

    Attributes:
        question: What the user writes.
        image: What the user shows with it, if anything.
        expected: The right answer; a number is that of one of the conversation's own answers (-1: the last one), which
            must differ from one another.
    """

    question: str
    image: DigitImage | None
    expected: str | int


@dataclass(frozen=True)
class Suite:
    """Conversations of one kind; each counts as right when its last answer is."""

    name: str
    conversations: list[list[Turn]]
    threshold: float


def _read(rng: np.random.Generator) -> Turn:
    image = draw_image(rng, load_samples(held_out=True))
    return Turn(READ, image, image.text)


def _count(rng: np.random.Generator) -> Turn:
    image = draw_image(rng, load_samples(held_out=True))
    return Turn(COUNT, image, str(len(image.digits)))


def _recalled(rng: np.random.Generator, question: str, expected: int) -> list[Turn]:
    """Two or three readings, of different texts, and a question about one of them."""
    readings: dict[str, Turn] = {}
    number = int(rng.integers(2, 4))
    while len(readings) < number:
        turn = _read(rng)
        readings.setdefault(turn.image.text, turn)
    return [*readings.values(), Turn(question, None, expected)]


def draw_suites(seed: int = 0, scale: float = 1.0) -> list[Suite]:
    """Draw the chats of the acceptance test: 200 single images and 100 of each other kind, times `scale`."""
    rngs = np.random.default_rng(seed).spawn(6)
    num_single, num_other = max(1, round(200 * scale)), max(1, round(100 * scale))
    return [
        Suite("read", [[_read(rngs[0])] for _ in range(num_single)], 0.90),
        Suite("second", [[_read(rngs[1]), _read(rngs[1])] for _ in range(num_other)], 0.90),
        Suite("count", [[_count(rngs[2])] for _ in range(num_other)], 0.95),
        Suite("first", [_recalled(rngs[3], FIRST, 0) for _ in range(num_other)], 0.95),
        Suite("last", [_recalled(rngs[4], LAST, -1) for _ in range(num_other)], 0.95),
        Suite("before", [_recalled(rngs[5], BEFORE, -2) for _ in range(num_other)], 0.95),
    ]


@dataclass(frozen=True)
class FormCase:
    """One image whose answer is JSON.

    Attributes:
        question: What the user writes.
        image: What the user shows.
        form: Names and types of the answer's fields, which the grammar forces; None: the model chooses them.
        expected: The right answer.
    """

    question: str
    image: DigitImage
    form: Form | None
    expected: dict[str, Any]


def draw_forms(seed: int = 0, scale: float = 1.0) -> dict[str, list[FormCase]]:
    """Draw 100 images to be answered in JSON with a schema, and 100 without, times `scale`."""
    rngs, number = np.random.default_rng([seed, 1]).spawn(2), max(1, round(100 * scale))
    samples = load_samples(held_out=True)
    schema, free = [], []
    for index in range(number):
        image, form = draw_image(rngs[0], samples), FORMS[index % len(FORMS)]
        schema.append(FormCase(READ, image, form, fill_form(form, image.text)))
        image = draw_image(rngs[1], samples)
        question, form = ((READ_JSON, {"digits": INTEGERS}), (COUNT_JSON, {"count": INTEGER}))[index % 2]
        free.append(FormCase(question, image, None, fill_form(form, image.text)))
    return {"schema": schema, "json": free}


@dataclass(frozen=True)
class ToolCase:
    """One image to be given to a tool, and then said.

    Attributes:
        image: What the user shows.
        name: The tool's name.
        form: Names and types of its arguments.
    """

    image: DigitImage
    name: str
    form: Form

    @property
    def tools(self) -> list[dict[str, Any]]:
        """Return the tool as OpenAI's protocol has it."""
        function = {"name": self.name, "description": "Takes what was read.", "parameters": schema_of(self.form)}
        return [{"type": "function", "function": function}]

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the right arguments."""
        return fill_form(self.form, self.image.text)


def draw_tools(seed: int = 0, scale: float = 1.0) -> list[ToolCase]:
    """Draw 100 images to be given to a tool, times `scale`."""
    rng, samples = np.random.default_rng([seed, 2]), load_samples(held_out=True)
    return [
        ToolCase(draw_image(rng, samples), *TOOLS[index % len(TOOLS)]) for index in range(max(1, round(100 * scale)))
    ]


@dataclass(frozen=True)
class Video:
    """Frames, uint8 (H, W, 3) each, and what there is to read in each."""

    frames: list[np.ndarray]
    texts: list[str]


def draw_video(rng: np.random.Generator, num_frames: int, min_hold: int = 3, max_hold: int = 12) -> Video:
    """Draw a video whose digits change every few frames; half of the frames are degraded as by a codec."""
    samples, grid = load_samples(held_out=True), draw_grid(rng)
    frames: list[np.ndarray] = []
    texts: list[str] = []
    while len(frames) < num_frames:
        image = draw_image(rng, samples, grid)
        for _ in range(int(rng.integers(min_hold, max_hold + 1))):
            frames.append(camera_noise(rng, image.pixels) if rng.random() < 0.5 else image.pixels)
            texts.append(image.text)
    return Video(frames[:num_frames], texts[:num_frames])
