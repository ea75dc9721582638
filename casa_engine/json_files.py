"""JSON files of checkpoints, bounded before they are read."""

import json
from pathlib import Path
from typing import Any

from casa_engine.errors import CheckpointError

# The largest that is known: tokenizer.json of a vocabulary of 150,000, some 11 MB.
MAX_JSON_BYTES = 64 << 20


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        CheckpointError: It is missing, too large or not JSON.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES} bytes")
        return json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds, which is an object.

    Raises:
        CheckpointError: As `read_json`, or it holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content
