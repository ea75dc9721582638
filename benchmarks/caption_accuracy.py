"""How well captions of a digits video fit it.

    python benchmarks/caption_accuracy.py VIDEO.json CAPTIONS.jsonl [VIDEO.json CAPTIONS.jsonl ...]

VIDEO.json is what `casa-digits-video` writes beside a video, CAPTIONS.jsonl what `casa-caption` writes; any number of
such pairs. A change is caught when the first frame that shows it, or the one after, is captioned with exactly its
digits. An unchanged frame should be silent; a catch one frame late is no repetition.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from casa_digits.video import Span, read_truth

MIN_CAUGHT, MAX_REPEATED = 0.90, 0.05
CLOCK_TOLERANCE_S = 1e-3


@dataclass(frozen=True)
class Accuracy:
    """Counts over one video or several.

    Attributes:
        changes: Scenes that a frame shows, the first one included.
        caught: Those captioned rightly within one frame.
        at_once: Those captioned rightly on their first frame.
        unchanged: Frames that show what the frame before shows.
        repeated: Those that were captioned all the same.
    """

    changes: int = 0
    caught: int = 0
    at_once: int = 0
    unchanged: int = 0
    repeated: int = 0

    def __add__(self, other: Accuracy) -> Accuracy:
        """Sum."""
        return Accuracy(
            *(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    @property
    def passed(self) -> bool:
        """Whether both demands are met."""
        return self.caught >= MIN_CAUGHT * self.changes and self.repeated <= MAX_REPEATED * self.unchanged

    def line(self) -> str:
        """For people."""
        return (
            f"changes caught within one frame {self.caught}/{self.changes} = {self.caught / self.changes:.1%} "
            f"(at once {self.at_once}), unchanged frames captioned {self.repeated}/{self.unchanged} = "
            f"{self.repeated / max(1, self.unchanged):.1%}"
        )


def compare(truth: list[Span], captions: list[tuple[float, str]]) -> Accuracy:
    """Counts for one video.

    Args:
        truth: What is to be read when.
        captions: Timestamp and caption of every frame, in order.
    """
    shown = [text_at(truth, time) for time, _ in captions]
    said = [caption for _, caption in captions]
    starts = [number for number, text in enumerate(shown) if number == 0 or text != shown[number - 1]]
    late = {number + 1 for number in starts if said[number] != shown[number] and is_late(number, shown, said)}
    at_once = sum(said[number] == shown[number] for number in starts)
    repeated = sum(said[number] != "" for number in set(range(len(said))) - set(starts) - late)
    return Accuracy(len(starts), at_once + len(late), at_once, len(said) - len(starts), repeated)


def is_late(number: int, shown: list[str], said: list[str]) -> bool:
    """Whether a change at frame `number` is captioned rightly on the next frame, which shows the same."""
    following = slice(number + 1, number + 2)
    return shown[following] == said[following] == [shown[number]]


def text_at(truth: list[Span], time: float) -> str:
    """What is to be read at a time."""
    begun = [span for span in truth if span.start <= time + CLOCK_TOLERANCE_S]
    return begun[-1].text


def read_captions(path: Path) -> list[tuple[float, str]]:
    """Timestamp and caption of every line."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["timestamp"], line["caption"]) for line in lines]


def main() -> int:
    """Print one line for each pair and one for all; return 1 if a demand is missed over all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="VIDEO.json CAPTIONS.jsonl, pair by pair")
    files = parser.parse_args().files
    if len(files) % 2:
        parser.error("the files come in pairs: VIDEO.json CAPTIONS.jsonl")
    total = Accuracy()
    for truth, captions in zip(files[::2], files[1::2], strict=True):
        accuracy = compare(read_truth(truth), read_captions(captions))
        total += accuracy
        print(f"{captions.name}: {accuracy.line()}")
    if len(files) > 2:
        print(f"all: {total.line()}")
    print("met" if total.passed else "MISSED", f"(demanded: at least {MIN_CAUGHT:.0%} and at most {MAX_REPEATED:.0%})")
    return 0 if total.passed else 1


if __name__ == "__main__":
    sys.exit(main())
