"""`StagedFolder`: writes a folder as one transaction; a run that ends at any point leaves the old one or the new one.

    work folder, beside the target (inside it where the target is a mount point or its parent is not writable)
      lock           held while a run lives: two runs on one target do not mix, and a lock that is free marks a leftover
      journal.json   how far the commit was; read by the next run, which finishes or drops what it finds
      new/           what is being built

    build in new/ -> sync -> link others' files into new/ -> exchange with the target -> remove the older files of ours
                                                   or move file by file (see folder_swap.py)

Only files are ever removed from the target that the caller names as its own.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from casa_engine.atomic_files import sync, write_atomically
from casa_engine.errors import OutputError
from casa_engine.folder_swap import (
    exchange,
    files_of,
    folders_of,
    link_foreign_files,
    move_into,
    remove_exchanged,
    unlink_foreign_files,
)

WORK_NAME = "casa-work"
MOUNTS = Path("/proc/self/mountinfo")


class StagedFolder:
    """A folder that appears whole, by `commit`, or not at all.

    Args:
        target: Where it belongs. Missing parents are made; a symbolic link is followed.
        last: Name of the file that makes the folder complete; readers reject a folder without it.
        owned: Called with a target that holds files; returns the relative paths of those that may be replaced. Raises
            for a folder that is not to be touched.
        needed_bytes: At least so much must be free.

    Attributes:
        path: The folder to write into, within `with`.

    Raises:
        OutputError: The target cannot be written, or another run is writing it.
    """

    def __init__(
        self, target: str | Path, last: str, owned: Callable[[Path], frozenset[str]], needed_bytes: int = 0
    ) -> None:
        self.target, self.last, self.needed_bytes = Path(os.path.realpath(target)), last, needed_bytes
        self._shown, self._owned_files = Path(target), owned
        self._made_parents: list[Path] = []

    def __enter__(self) -> Self:
        with self._refusals():
            self._check_target()
            try:
                self._make_parents()
                self._work = _work_folder(self.target)
                self.path = self._work / "new"
                self._lock = self._acquire()
            except BaseException:
                self._remove_parents()
                raise
        try:
            with self._refusals():
                self._recover()
                self._owned()
                self._check_space()
                self.path.mkdir()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()
        cause = find_os_error(error)
        if cause is not None:
            raise self._refusal(cause) from error  # a full disk, most often

    def commit(self) -> None:
        """Move the folder to its target.

        Raises:
            OutputError: It cannot; the target is as before.
        """
        with self._refusals():
            _sync_tree(self.path)
            if not self.target.exists():
                self.path.rename(self.target)
                sync(self.target.parent)
                self._made_parents = []
                return
            owned = self._owned()
            self._check_clashes(owned)
            if not self._exchange(owned):
                self._move(owned)

    def _exchange(self, owned: frozenset[str]) -> bool:
        """Swap staged and older folder; False, with nothing changed, where that is not possible."""
        if self._work.parent == self.target or _works_in(self.target):
            return False
        self._write_journal(state="exchange", inode=self.path.stat().st_ino, owned=sorted(owned))
        try:
            link_foreign_files(self.target, self.path, owned)
            _sync_folders(self.path)
            exchange(self.path, self.target)
        except OSError:
            unlink_foreign_files(self.target, self.path)
            return False
        # The new one is in its place: where the older one cannot be removed now, it is by the next run.
        with suppress(OSError):
            sync(self.target.parent)
            remove_exchanged(self.path, self.target, owned)
        return True

    def _move(self, owned: frozenset[str]) -> None:
        new = set(files_of(self.path))
        self._write_journal(state="move", outdated=sorted(owned - new))
        self._finish_move()
        for folder in {parent for path in new for parent in Path(path).parents}:
            sync(self.target / folder)

    def _finish_move(self) -> None:
        outdated = [path for path in self._read_journal()["outdated"] if _is_file_within(self.target, path)]
        move_into(self.path, self.target, outdated, self.last)

    def _recover(self) -> None:
        """Finish or drop what a run left that ended early."""
        if self.path.exists():
            journal = self._read_journal()
            state = journal.get("state")
            if state == "move":
                self._finish_move()
            elif state == "exchange" and self.target.exists() and self.target.stat().st_ino == journal.get("inode"):
                remove_exchanged(self.path, self.target, frozenset(journal["owned"]))
        if self.path.exists():
            shutil.rmtree(self.path)
        self._journal.unlink(missing_ok=True)

    def _owned(self) -> frozenset[str]:
        if not self.target.exists() or all(entry == self._work for entry in self.target.iterdir()):
            return frozenset()
        return frozenset(path for path in self._owned_files(self.target) if _is_file_within(self.target, path))

    def _check_target(self) -> None:
        try:
            str(self.target).encode()
        except UnicodeEncodeError as error:
            raise OutputError(
                f"{self._shown} is not valid UTF-8, and the libraries that write models take no other names. Name "
                "another folder."
            ) from error
        if not self.target.exists():
            if os.path.lexists(self.target):
                raise OutputError(f"{self._shown} is a symbolic link that leads to itself. Name another folder.")
            return
        if not self.target.is_dir():
            raise OutputError(f"{self._shown} is a file; expected a folder. Name a new or empty one.")
        if not os.access(self.target, os.W_OK | os.X_OK):
            raise OutputError(f"{self._shown} is not writable. Change its permissions, or name another folder.")

    def _check_space(self) -> None:
        free = shutil.disk_usage(self._work).free
        if free < self.needed_bytes:
            raise OutputError(
                f"{self._shown} needs at least {self.needed_bytes / 1e6:.1f} MB; its disk has {free / 1e6:.1f} MB "
                "free. Free some space, or name a folder on another disk."
            )

    def _check_clashes(self, owned: frozenset[str]) -> None:
        """Raise OutputError where files of other programs would be overwritten."""
        for path in files_of(self.path):
            parents = [str(parent) for parent in Path(path).parents[:-1]]
            taken = [parent for parent in parents if _is_file(self.target / parent) and parent not in owned]
            if path not in owned and os.path.lexists(self.target / path):
                taken.append(path)
            if taken:
                raise OutputError(
                    f"{self._shown / taken[0]} is in the way: it is not from an earlier run, and would be "
                    "overwritten. Move it elsewhere, or name another folder."
                )

    def _make_parents(self) -> None:
        missing = [parent for parent in self.target.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
            self._made_parents.append(parent)

    def _remove_parents(self) -> None:
        with suppress(OSError):  # another program's files are in it by now
            for parent in reversed(self._made_parents):
                parent.rmdir()

    def _acquire(self) -> int:
        """Make the work folder and lock it; the lock of a run that ended is free."""
        while True:
            self._work.mkdir(exist_ok=True)
            if self._work.is_symlink() or not self._is_ours():
                raise OutputError(f"{self._work} holds files of others. Move it elsewhere: casa-engine works there.")
            try:
                lock = os.open(self._work / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # its holder removed the folder just now
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), (self._work / "lock").stat()):
                    return lock
            except BlockingIOError:
                os.close(lock)
                raise OutputError(
                    f"another run is writing {self._shown}. Wait for its end, or name another folder."
                ) from None
            except FileNotFoundError:
                pass
            os.close(lock)

    def _is_ours(self) -> bool:
        """Return whether the work folder has only what runs of ours leave: the lock comes first and goes last."""
        names = {entry.name for entry in self._work.iterdir()}
        unfinished = {name for name in names if name.startswith(f".{self._journal.stem}.")}
        return not names or ("lock" in names and names <= {"lock", "new", self._journal.name} | unfinished)

    def _release(self) -> None:
        """Drop what was not committed, finish what was, and remove the work folder; a later run tries again."""
        with suppress(OSError, OutputError):
            self._recover()
            for entry in sorted(self._work.iterdir(), key=lambda entry: entry.name == "lock"):
                entry.unlink()
            self._work.rmdir()
        self._remove_parents()
        os.close(self._lock)

    @property
    def _journal(self) -> Path:
        return self._work / "journal.json"

    def _write_journal(self, **fields: object) -> None:
        write_atomically(self._journal, json.dumps(fields).encode())

    def _read_journal(self) -> dict:
        if not self._journal.exists():
            return {}
        try:
            journal = json.loads(self._journal.read_bytes())
            paths = journal["outdated"] if journal["state"] == "move" else journal["owned"]
            if not all(isinstance(path, str) for path in paths):
                raise TypeError("a path is no text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise OutputError(f"{self._journal} is damaged: {error!r}. Move {self._work} elsewhere.") from error
        return journal

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> OutputError:
        reason = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        return OutputError(f"{self._shown} was not written: {reason}. What was there is as before.")


def check_apart(folder: Path, other: Path) -> None:
    """Raise OutputError where one of two folders is, or is within, the other: each would carry the other's files."""
    if is_within(folder, other) or is_within(other, folder):
        raise OutputError(f"{folder} and {other} are the same or within each other. Name a folder elsewhere.")


def is_within(folder: Path, other: Path) -> bool:
    """Return whether a folder is the other one or in it, links followed; neither has to exist."""
    return Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(other))


def find_os_error(error: BaseException | None) -> OSError | None:
    """Return the operating system's error behind an exception: itself, or the one that a library in Rust describes."""
    if isinstance(error, OSError) or error is None:
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _work_folder(target: Path) -> Path:
    inside = target.is_dir() and (_is_mount_point(target) or not os.access(target.parent, os.W_OK | os.X_OK))
    return target / f".{WORK_NAME}" if inside else target.parent / f".{target.name}.{WORK_NAME}"


def _is_mount_point(path: Path) -> bool:
    """Return whether it is one; unlike `os.path.ismount`, also for a folder of the same file system."""
    if os.path.ismount(path) or not MOUNTS.exists():
        return os.path.ismount(path)
    escaped = str(path).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    return any(line.split(" ")[4] == escaped for line in MOUNTS.read_text(errors="surrogateescape").splitlines())


def _works_in(folder: Path) -> bool:
    """Return whether the current folder is this one or in it: a shell there would be left in a deleted folder."""
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:
        return False


def _is_file(path: Path) -> bool:
    return os.path.lexists(path) and (path.is_symlink() or not path.is_dir())


def _is_file_within(folder: Path, path: str) -> bool:
    """Return whether a relative path is a file in the folder, without a detour: `..`, a symbolic link on the way."""
    parts = Path(path).parts
    if not parts or ".." in parts or Path(path).is_absolute() or not _is_file(folder / path):
        return False
    return not any((folder / parent).is_symlink() for parent in Path(path).parents[:-1])


def _sync_tree(folder: Path) -> None:
    for path in files_of(folder):
        if not (folder / path).is_symlink():
            sync(folder / path)
    _sync_folders(folder)


def _sync_folders(folder: Path) -> None:
    for path in [*folders_of(folder), "."]:
        sync(folder / path)
