"""A folder is the old one or the new one, whenever its writer is killed, and files of others stay."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from casa_engine import staged_folder
from casa_engine.atomic_files import publish, replaced_atomically, staged_beside, write_atomically
from casa_engine.errors import CasaError, OutputError
from casa_engine.staged_folder import StagedFolder
from killing import ended_at

LAST = "list.txt"
FOREIGN = {"notes.txt": "mine", "pictures/cat.png": "meow", "engines/timing.cache": "fast"}
OLD = {
    "a.txt": "old a",
    "gone.txt": "old",
    "engines/one.engine": "old engine",
    LAST: "a.txt gone.txt engines/one.engine",
}
NEW = {"a.txt": "new a", "b/c.txt": "new c", LAST: "a.txt b/c.txt"}


def owned(folder: Path) -> frozenset[str]:
    """The policy of these tests: `list.txt` names the files that may be replaced."""
    if not (folder / LAST).is_file():
        raise CasaError(f"{folder} holds other files")
    return frozenset((folder / LAST).read_text().split()) | {LAST}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(target: Path) -> None:
    with StagedFolder(target, LAST, owned) as staged:
        fill(staged.path, NEW)
        staged.commit()


@pytest.fixture
def target(tmp_path) -> Path:
    fill(tmp_path / "out", OLD | FOREIGN)
    (tmp_path / "out" / "empty").mkdir()
    (tmp_path / "elsewhere.txt").write_text("theirs")
    (tmp_path / "out" / "link.txt").symlink_to(tmp_path / "elsewhere.txt")
    return tmp_path / "out"


LINK = {"link.txt": "theirs"}


def test_kept_and_replaced(target):
    target.chmod(0o750)
    inode = (target / "notes.txt").stat().st_ino
    write(target)
    assert contents(target) == NEW | FOREIGN | LINK
    assert (target / "empty").is_dir() and (target / "link.txt").is_symlink()
    assert (target / "notes.txt").stat().st_ino == inode and target.stat().st_mode & 0o777 == 0o750
    assert {path.name for path in target.parent.iterdir()} == {"out", "elsewhere.txt"}


@pytest.mark.parametrize("way", ["exchange", "move", "new"])
def test_killed_at_every_step(target, way, monkeypatch):
    """A reader finds the old or the new; where files are moved one by one, at worst a folder without its last file."""
    if way == "move":
        monkeypatch.setattr(staged_folder, "_is_mount_point", lambda path: path == target)
    step, seen = 0, set()
    while ended_at(step, target.parent, partial(write, target if way != "new" else target / f"{step}/out")):
        found = contents(target)
        if way == "new":
            assert not (target / f"{step}/out").exists() or contents(target / f"{step}/out") == NEW
        else:
            assert (FOREIGN | LINK).items() <= found.items(), f"others' files at step {step}"
            ours = {
                name: text for name, text in found.items() if name not in FOREIGN | LINK and ".casa-work" not in name
            }
            seen.add("old" if ours == OLD else "new" if ours == NEW else "between")
            assert ours in (OLD, NEW) or (way == "move" and LAST not in ours)
        write(target if way != "new" else target / f"{step}/out")
        if way != "new":
            assert contents(target) == NEW | FOREIGN | LINK, f"the next run after step {step}"
            assert {path.name for path in target.parent.iterdir()} == {"out", "elsewhere.txt"}
            assert not (target / ".casa-work").exists()
            for name in NEW:
                (target / name).unlink()
            fill(target, OLD)
        step += 1
    assert step > 20
    assert way == "new" or {"old", "new"} <= seen


def test_failure_leaves_the_old(target):
    before = contents(target)
    for error in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), StagedFolder(target, LAST, owned) as staged:
            fill(staged.path, NEW)
            raise error
    assert contents(target) == before
    with StagedFolder(target, LAST, owned) as staged:
        fill(staged.path, NEW)  # never committed
    assert contents(target) == before
    assert {path.name for path in target.parent.iterdir()} == {"out", "elsewhere.txt"}


def test_new_folder_leaves_nothing_when_it_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), StagedFolder(tmp_path / "a/b/out", LAST, owned) as staged:
        fill(staged.path, NEW)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_two_at_once(target):
    with StagedFolder(target, LAST, owned) as first:
        fill(first.path, NEW)
        with pytest.raises(OutputError, match="another run is writing"):
            write(target)
        first.commit()
    assert contents(target) == NEW | FOREIGN | LINK
    write(target)


def test_policy_is_asked_first_and_again_at_the_end(tmp_path):
    fill(tmp_path / "out", FOREIGN)
    with pytest.raises(CasaError, match="other files"):
        write(tmp_path / "out")
    assert contents(tmp_path) == {f"out/{name}": text for name, text in FOREIGN.items()}
    with pytest.raises(CasaError, match="other files"), StagedFolder(tmp_path / "new", LAST, owned) as staged:
        fill(staged.path, NEW)
        fill(tmp_path / "new", FOREIGN)  # somebody else's, meanwhile
        staged.commit()
    assert contents(tmp_path / "new") == FOREIGN


@pytest.mark.parametrize("name", ["b/c.txt", "b"])
def test_file_in_the_way(target, name):
    fill(target, {name: "mine"})
    before = contents(target)
    with pytest.raises(OutputError, match="is in the way"):
        write(target)
    assert contents(target) == before


@pytest.mark.parametrize(
    "listed", ["../elsewhere.txt", "link.txt/x", "folder/elsewhere.txt", "/etc/hostname", "empty", "."]
)
def test_lists_reach_nothing_outside(target, listed):
    (target / "folder").symlink_to(target.parent)
    fill(target, {LAST: f"a.txt {listed}"})
    write(target)
    assert (target.parent / "elsewhere.txt").read_text() == "theirs" and (target / "empty").is_dir()
    assert (target / "folder").is_symlink() and Path("/etc/hostname").exists()


def test_link_that_the_list_names_is_replaced_and_its_target_stays(target):
    (target / "a.txt").unlink()
    (target / "a.txt").symlink_to(target.parent / "elsewhere.txt")
    write(target)
    assert contents(target) == NEW | FOREIGN | LINK
    assert (target.parent / "elsewhere.txt").read_text() == "theirs"


def test_target_behind_a_link(target):
    (target.parent / "link").symlink_to(target)
    write(target.parent / "link")
    assert (target.parent / "link").is_symlink() and contents(target) == NEW | FOREIGN | LINK


def test_current_folder_stays_the_same_folder(target, monkeypatch):
    monkeypatch.chdir(target)
    inode = target.stat().st_ino
    write(Path("."))
    assert target.stat().st_ino == inode and contents(target) == NEW | FOREIGN | LINK


def test_file_systems_without_exchange_or_links(target, monkeypatch):
    def refuse(*paths, **options):
        raise OSError(22, "Invalid argument")

    for name in ("exchange", "link_foreign_files"):
        with monkeypatch.context() as patch:
            patch.setattr(staged_folder, name, refuse)
            write(target)
        assert contents(target) == NEW | FOREIGN | LINK
        assert not (target.parent / ".out.casa-work").exists()


def test_full_disk(target):
    before = contents(target)
    with pytest.raises(OutputError, match="needs at least 1000000000000"):
        StagedFolder(target, LAST, owned, needed_bytes=10**18).__enter__()
    with pytest.raises(OutputError, match="No space left on device"), StagedFolder(target, LAST, owned) as staged:
        fill(staged.path, NEW)
        raise OSError(28, "No space left on device")
    assert contents(target) == before


@pytest.mark.parametrize("name", ["thesis.tex", "new/thesis.tex", "journal.json", "new"])
@pytest.mark.parametrize("link", [False, True])
def test_folder_of_others_in_the_place_of_the_work_folder(target, name, link):
    work = target.parent / ".out.casa-work"
    if link:
        fill(target.parent / "theirs", {name: "mine", "lock": ""})
        work.symlink_to(target.parent / "theirs")
    else:
        fill(work, {name: "mine"})
    with pytest.raises(OutputError, match="holds files of others"):
        write(target)
    assert (work / name).read_text() == "mine"


def test_older_folder_that_cannot_be_removed(target, monkeypatch):
    """The new one is in its place all the same, and the next run removes the older one."""

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(staged_folder, "remove_exchanged", refuse)
        write(target)
    assert contents(target) == NEW | FOREIGN | LINK and (target.parent / ".out.casa-work").exists()
    write(target)
    assert contents(target) == NEW | FOREIGN | LINK and not (target.parent / ".out.casa-work").exists()


def test_target_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file; expected a folder"):
        write(tmp_path / "out")
    with pytest.raises(OutputError, match="Not a directory"):
        write(tmp_path / "out/deeper")
    assert contents(tmp_path) == {"out": "mine"}


def test_mounted_read_only_and_bound(target):
    """Real mounts: in a mount namespace of its own, where this user may make one."""
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
import importlib, pathlib, subprocess
test = importlib.import_module("test_staged_folder")
target = pathlib.Path({str(target)!r})
subprocess.run(["mount", "--bind", target, target], check=True)
test.write(target)
assert test.contents(target) == test.NEW | test.FOREIGN | test.LINK
subprocess.run(["mount", "-o", "remount,ro,bind", target], check=True)
for path, words in ((target, "is not writable"), (target / "new", "Read-only file system")):
    with test.pytest.raises(test.OutputError, match=words):
        test.write(path)
"""
    if subprocess.run(["unshare", "-m", "mount", "--bind", target, target], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (b"\xff", "is not valid UTF-8"),
        (b"long/" + b"x" * 250, "File name too long"),
        (b"loop", "is a symbolic link that leads to itself"),
        (b"loop/deeper", "File exists"),
    ],
)
def test_names_that_cannot_be_written(tmp_path, name, words):
    """Said at once, and no parent folder is left behind."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = list(tmp_path.iterdir())
    with pytest.raises(OutputError, match=words):
        StagedFolder(tmp_path / os.fsdecode(name), LAST, owned).__enter__()
    assert list(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "journal",
    [
        "",
        "{",
        "[]",
        "5",
        "null",
        "[" * 100_000,
        '{"state": "move"}',
        '{"state": "move", "outdated": [5]}',
        '{"state": 5}',
    ],
)
def test_damaged_journal(target, journal):
    before = contents(target)
    work = target.parent / ".out.casa-work"
    fill(work, {"lock": "", "journal.json": journal, "new/half.txt": "half"})
    with pytest.raises(OutputError, match=r"journal.json is damaged.*Move .*casa-work elsewhere"):
        write(target)
    assert contents(target) == before and contents(work)["new/half.txt"] == "half"


def test_journal_reaches_nothing_outside(target):
    fill(target.parent / ".out.casa-work", {"lock": "", "new/a.txt": "new a"})
    absolute = target.parent / "absolute.txt"
    absolute.write_text("theirs")
    journal = {"state": "move", "outdated": ["../elsewhere.txt", str(absolute), "gone.txt"]}
    (target.parent / ".out.casa-work" / "journal.json").write_text(json.dumps(journal))
    write(target)
    assert (target.parent / "elsewhere.txt").read_text() == absolute.read_text() == "theirs"
    assert contents(target) == NEW | FOREIGN | LINK


def test_lock_of_a_dead_run_is_free(target):
    work = target.parent / ".out.casa-work"
    fill(work, {"lock": "", "new/half.txt": "half"})
    descriptor = os.open(work / "lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="another run"):
        write(target)
    os.close(descriptor)
    write(target)
    assert not work.exists()


def test_atomic_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", b"one")
    (tmp_path / ".file.0123abcd.part").write_text("of a killed run")
    (tmp_path / ".filet.0123abcd.part").write_text("of another file")
    with replaced_atomically(tmp_path / "file") as first:
        first.write_text("first")
        write_atomically(tmp_path / "file", b"second")  # meanwhile, by another run
        assert first.exists()
    assert contents(tmp_path) == {"file": "first", ".filet.0123abcd.part": "of another file"}
    (tmp_path / ".filet.0123abcd.part").unlink()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(tmp_path / "file", b"two")
    assert contents(tmp_path) == {"file": "first"}


TOGETHER = ("film.srt", "film.vtt", "film.jsonl")


def write_together(folder: Path, text: str) -> None:
    with ExitStack() as stack:
        parts = {stack.enter_context(staged_beside(folder / name)): folder / name for name in TOGETHER}
        for part in parts:
            part.write_text(text)
        publish(parts)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_files_that_take_their_places_together(tmp_path, number):
    """Every file is the old or the new; whoever is not killed puts all of them there, or none."""
    fill(tmp_path, {".film.01234567.part.txt": "mine", ".film.notes123.part.srt": "mine too"})
    others, step, seen = contents(tmp_path), 0, set()
    write_together(tmp_path, "old")
    while ended_at(step, tmp_path, lambda: write_together(tmp_path, "new"), number):
        found = contents(tmp_path)
        assert others.items() <= found.items()
        texts = {found[name] for name in TOGETHER}
        assert texts <= {"old", "new"} and (number == signal.SIGKILL or len(texts) == 1)
        seen |= texts
        write_together(tmp_path, "old")
        assert contents(tmp_path) == others | dict.fromkeys(TOGETHER, "old")
        step += 1
    assert step > 8 and seen == {"old", "new"}


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    write_together(tmp_path, "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device"):
        write_together(tmp_path, "new")
    assert contents(tmp_path) == dict.fromkeys(TOGETHER, "old")
