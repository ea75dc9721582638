"""What casa-tiny-digits says about itself on the live page: its checkpoint's `demonstration.json`."""

import json
from pathlib import Path

from casa_digits.phrases import BEFORE, COUNT, READ
from casa_engine.live.demonstration import DEMONSTRATION_FILE

DEMONSTRATION = {
    "reads": "Reads handwritten digits: one to four in a picture, all of one colour. It was trained on nothing else.",
    # Only kinds that are answered right at least 95 times of 100; tests/browser asks each during the page's clip.
    "questions": [READ[0], COUNT[0], BEFORE[0]],
}


def write_demonstration(folder: Path) -> None:
    """Write the file into a checkpoint."""
    (Path(folder) / DEMONSTRATION_FILE).write_text(json.dumps(DEMONSTRATION, indent=2) + "\n")
