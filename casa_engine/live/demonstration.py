"""What a stranger is told about a checkpoint before the first frame: what it can see, and what may be asked."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casa_engine.errors import CheckpointError

DEMONSTRATION_FILE = "demonstration.json"
MAX_CHARACTERS = 300
MAX_QUESTIONS = 12


@dataclass(frozen=True)
class Demonstration:
    """A checkpoint's own words about itself; empty where it brings none.

    Attributes:
        reads: What it can see and say, in a sentence for visitors.
        questions: What it answers rightly about a live video, in the order in which a page shows them.
    """

    reads: str = ""
    questions: tuple[str, ...] = ()

    @classmethod
    def for_checkpoint(cls, folder: Path) -> "Demonstration":
        """Return what the checkpoint's `demonstration.json` says.

        Raises:
            CheckpointError: The file is not what it should be.
        """
        path = Path(folder) / DEMONSTRATION_FILE
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{DEMONSTRATION_FILE} of the checkpoint is no JSON: {error}") from error
        if not isinstance(values, dict) or set(values) != {"reads", "questions"}:
            raise CheckpointError(
                f"{DEMONSTRATION_FILE} of the checkpoint is no description of it; expected an object with the fields "
                "reads and questions and no other."
            )
        questions = values["questions"]
        if not isinstance(questions, list) or len(questions) > MAX_QUESTIONS:
            raise CheckpointError(
                f"questions in {DEMONSTRATION_FILE} of the checkpoint is invalid; expected a list of at most "
                f"{MAX_QUESTIONS}."
            )
        return cls(_text("reads", values["reads"]), tuple(_text("questions", question) for question in questions))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value.strip()) <= len(value) <= MAX_CHARACTERS:
        raise CheckpointError(
            f"{name} in {DEMONSTRATION_FILE} of the checkpoint is invalid; expected text of 1 to {MAX_CHARACTERS} "
            "characters."
        )
    return value
