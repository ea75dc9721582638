"""Two ways to replace an older folder by a finished one, and the steps of each.

Exchange    the kernel swaps both folders in one step: a reader sees the old or the new, never a mixture. Files that
            are not ours are linked into the new folder first, so that they are in their place at every moment.
Moves       file by file, where folders cannot be swapped: a mount point, the current folder, a file system without
            the call or without hard links. Files that are not ours are not touched. The caller keeps a journal and
            repeats the moves after a crash.

Paths of files are relative to their folder, with `/`. A symbolic link is a file: it is never followed.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2


def files_of(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all that is no folder. Raise OSError for a folder that cannot be read."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from (f"{entry.name}/{path}" for path in files_of(Path(entry.path)))
            else:
                yield entry.name


def folders_of(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all folders in it, outer ones first."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield entry.name
                yield from (f"{entry.name}/{path}" for path in folders_of(Path(entry.path)))


def link_foreign_files(old: Path, new: Path, owned: frozenset[str]) -> None:
    """Link what is in `old` and not ours into `new`, and give the folders their owner and permissions.

    Raises:
        OSError: The file system has no hard links, or a file may not be linked.
    """
    foreign = [path for path in files_of(old) if path not in owned]
    folders = {str(parent) for path in foreign for parent in Path(path).parents}
    folders |= {path for path in folders_of(old) if not any((old / path).iterdir())} | {"."}
    for path in sorted(folders):  # outer ones first
        (new / path).mkdir(parents=True, exist_ok=True)
        _copy_rights(old / path, new / path)
    for path in foreign:
        os.link(old / path, new / path, follow_symlinks=False)


def _copy_rights(old: Path, new: Path) -> None:
    known, made = old.stat(), new.stat()
    if (known.st_uid, known.st_gid) != (made.st_uid, made.st_gid):
        os.chown(new, known.st_uid, known.st_gid)
    shutil.copystat(old, new)


def unlink_foreign_files(old: Path, new: Path) -> None:
    """Undo `link_foreign_files`: remove the links from `new`; the files stay in `old`."""
    for path in files_of(new):
        if _same_file(old / path, new / path):
            (new / path).unlink()


def exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step.

    Raises:
        OSError: Kernel or file system cannot.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))


def remove_exchanged(old: Path, target: Path, owned: frozenset[str]) -> None:
    """Remove the older folder after an exchange, possibly after a crash in between.

    Files that are not ours are in `target` too. Where that is another file by now, the one written last stays.
    """
    for path in files_of(old):
        if path in owned or _same_file(old / path, target / path) or _is_newer(target / path, old / path):
            (old / path).unlink()
        else:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(old / path, target / path)
    for path in reversed(list(folders_of(old))):
        (old / path).rmdir()
    old.rmdir()


def move_into(staged: Path, target: Path, outdated: Iterable[str], last: str) -> None:
    """Remove outdated files of ours from `target` and move the new ones in; may be repeated after a crash.

    Args:
        staged: The finished folder.
        target: Where its files belong.
        outdated: Our files in `target` that no new one replaces.
        last: The file that makes a folder complete: the older one goes first, the new one comes last.
    """
    if (staged / last).exists():
        (target / last).unlink(missing_ok=True)
    for path in outdated:
        with suppress(FileNotFoundError, NotADirectoryError):
            (target / path).unlink()
        for folder in Path(path).parents[:-1]:
            with suppress(OSError):  # others' files are in it
                (target / folder).rmdir()
    for path in sorted(files_of(staged), key=lambda path: (path == last, path)):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / path, target / path)


def _is_newer(one: Path, other: Path) -> bool:
    return os.path.lexists(one) and one.lstat().st_mtime_ns >= other.lstat().st_mtime_ns


def _same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samestat(one.lstat(), other.lstat())
    except (FileNotFoundError, NotADirectoryError):
        return False
