"""Files that are written as a whole or not at all, also across a crash."""

import fcntl
import glob
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

HASH_CHUNK_BYTES = 1 << 22


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that no reader ever sees half of it.

    Args:
        path: Where it belongs; what is there is replaced. Its folder must exist.
        content: All of it.

    Raises:
        OSError: It cannot be written; what was there is unchanged.
    """
    with replaced_atomically(path) as part:
        part.write_bytes(content)


@contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`, which replaces `path` when the block ends.

    Raises:
        OSError: It cannot be written; what was there is unchanged.
    """
    with staged_beside(path) as part:
        yield part
        publish({part: path})


@contextmanager
def staged_beside(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`, with its suffix, for `publish`; removed unless it is moved.

    A file that a killed run left is removed: its lock is free.

    Raises:
        OSError: It cannot be made.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.stem)}.{'[0-9a-f]' * 8}.part{glob.escape(path.suffix)}"):
        with suppress(BlockingIOError, FileNotFoundError), _locked(leftover, os.O_RDWR):
            leftover.unlink()
    part = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    with _locked(part, os.O_RDWR | os.O_CREAT | os.O_EXCL):
        try:
            yield part
        finally:
            part.unlink(missing_ok=True)


def publish(staged: Mapping[Path, Path]) -> None:
    """Move finished files to their paths: all of them are on the disk before the first one is moved.

    Args:
        staged: Target paths by the files of `staged_beside`; a target is in the same folder.

    Raises:
        OSError: They cannot be written; if one of several targets cannot be, the others may be new.
    """
    for part in staged:
        sync(part)
    try:
        _move(staged)
    except KeyboardInterrupt:
        _move(staged)  # those that are left: it takes no time
        raise
    for folder in {path.parent for path in staged.values()}:
        sync(folder)


def _move(staged: Mapping[Path, Path]) -> None:
    for part, path in staged.items():
        if part.exists():
            part.replace(path)


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[None]:
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
