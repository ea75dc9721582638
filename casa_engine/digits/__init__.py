"""casa-tiny-digits: a small CASA model that reads handwritten digits, with its data, training and evaluation.

Only `checkpoint_path` is needed to use it; nothing here is imported by the rest of the package.
"""

from pathlib import Path


def checkpoint_path() -> Path:
    """Folder of the embedded checkpoint."""
    return Path(__file__).parent / "checkpoint"


__all__ = ["checkpoint_path"]
