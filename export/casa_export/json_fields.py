"""Fields of a JSON file, with the type that they must have: a file of ours may have been edited or damaged."""

import json
from pathlib import Path
from typing import Any

# What reading and taking apart a file of another shape raises.
FAULTS = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


def read_object(path: Path) -> dict[str, Any]:
    """Return the one object that a file contains. Raise one of `FAULTS`."""
    return expect(json.loads(path.read_bytes()), dict, path.name)


def expect(value: Any, kind: type, what: str) -> Any:
    """Return the value. Raise TypeError if it is of another type; True and False are no numbers."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{what} is {type(value).__name__}; expected {kind.__name__}")
    return value
