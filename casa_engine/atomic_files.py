"""Files that are there whole or not at all, also after a crash."""

import hashlib
import os
from pathlib import Path

HASH_CHUNK_BYTES = 1 << 22


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a file beside its place, syncs it and renames it, so that nobody ever reads half of it.

    Args:
        path: Where it belongs; what is there is replaced. Its folder must exist.
        content: All of it.

    Raises:
        OSError: It cannot be written; what was there is unchanged.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
