"""A folder in which exports share built engines: files `<key>-<SHA-256 of the file>.engine`, written atomically."""

import os
from pathlib import Path

from casa_engine.atomic_files import file_hash, write_atomically
from casa_engine.errors import OutputError


class EngineCache:
    """Built engines by the key of all that they were built from.

    Args:
        folder: Made where it is missing.

    Raises:
        OutputError: It cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"--engine-cache {folder} cannot be made: {error.strerror}. Name a folder.") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"--engine-cache {folder} is not writable. Change its permissions, or name another.")

    def find(self, key: str) -> Path | None:
        """Return the engine of a key; damaged ones are removed."""
        for path in sorted(filter(Path.is_file, self.folder.glob(f"{key}-*.engine"))):
            if file_hash(path) == path.stem.removeprefix(f"{key}-"):
                return path
            path.unlink(missing_ok=True)
        return None

    def add(self, key: str, engine: Path) -> None:
        """Keep a copy of an engine."""
        write_atomically(self.folder / f"{key}-{file_hash(engine)}.engine", engine.read_bytes())
