"""What casa-tiny-digits is judged on: conversations about images of held-out digits, the same for every runner."""

from dataclasses import dataclass

import numpy as np

from casa_digits.augment import camera_noise
from casa_digits.data import DigitImage, draw_grid, draw_image, load_samples

READ, COUNT, FIRST = "Read the digits.", "How many digits are there?", "What did you read first?"


@dataclass(frozen=True)
class Turn:
    """One question.

    Attributes:
        question: What the user writes.
        image: What the user shows with it, if anything.
        expected: The right answer; None means the conversation's own first answer.
    """

    question: str
    image: DigitImage | None
    expected: str | None


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


def draw_suites(seed: int = 0, scale: float = 1.0) -> list[Suite]:
    """Draws the four suites of the acceptance test: 200 single images and 100 of each other kind, times `scale`."""
    rngs = np.random.default_rng(seed).spawn(4)
    num_single, num_other = max(1, round(200 * scale)), max(1, round(100 * scale))
    single = [[_read(rngs[0])] for _ in range(num_single)]
    second = [[_read(rngs[1]), _read(rngs[1])] for _ in range(num_other)]
    count = [[_count(rngs[2])] for _ in range(num_other)]
    first = [
        [*(_read(rngs[3]) for _ in range(int(rngs[3].integers(2, 4)))), Turn(FIRST, None, None)]
        for _ in range(num_other)
    ]
    return [
        Suite("read", single, 0.90),
        Suite("second", second, 0.90),
        Suite("count", count, 0.95),
        Suite("first", first, 0.95),
    ]


@dataclass(frozen=True)
class Video:
    """Frames, uint8 (H, W, 3) each, and what there is to read in each."""

    frames: list[np.ndarray]
    texts: list[str]


def draw_video(rng: np.random.Generator, num_frames: int, min_hold: int = 3, max_hold: int = 12) -> Video:
    """Draws a video whose digits change every few frames; half of the frames are degraded as by a codec."""
    samples, grid = load_samples(held_out=True), draw_grid(rng)
    frames: list[np.ndarray] = []
    texts: list[str] = []
    while len(frames) < num_frames:
        image = draw_image(rng, samples, grid)
        for _ in range(int(rng.integers(min_hold, max_hold + 1))):
            frames.append(camera_noise(rng, image.pixels) if rng.random() < 0.5 else image.pixels)
            texts.append(image.text)
    return Video(frames[:num_frames], texts[:num_frames])
