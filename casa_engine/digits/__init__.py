"""casa-tiny-digits, the embedded checkpoint: a small CASA model that reads handwritten digits (models/casa_digits)."""

from pathlib import Path


def checkpoint_path() -> Path:
    """Folder of the embedded checkpoint."""
    return Path(__file__).parent / "checkpoint"


__all__ = ["checkpoint_path"]
