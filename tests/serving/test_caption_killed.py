"""`casa-caption` that is killed, interrupted or out of space leaves whole files, old or new, and others' as they are.

What forks or mounts runs in a process of its own: this file, as a program.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from casa_digits.video import make_video
from casa_serving.caption.cli import main
from killing import ended_at
from scripted_caption import scripted

FORMATS = ("jsonl", "srt", "vtt")
OTHERS = {"out.txt": "mine", ".out.srt": "mine too", ".casa-caption-x": "mine, too", ".out.notes123.part.srt": "also"}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "digits.mp4"
    make_video(path, 2, 10)
    return path


def as_program(*arguments: object, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run `attempt_...` of this file in a fresh process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*before, sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def attempt_signals(number: int, video: Path, folder: Path) -> None:
    """End the command by a signal at each of its steps."""
    patch = pytest.MonkeyPatch()
    scripted(patch, lambda sample: f"at {sample.timestamp:g}")

    def caption() -> None:
        main([str(video), "--output", str(folder / "out"), "--quiet"])

    assert not ended_at(1_000_000, folder, caption)
    new = texts(folder)
    assert new.keys() == {f"out.{suffix}" for suffix in FORMATS}
    old = {name: f"old {name}" for name in new}
    step, seen = 0, set()
    while True:
        for name, text in (old | OTHERS).items():
            (folder / name).write_text(text)
        if not ended_at(step, folder, caption, number):
            break
        found = texts(folder)
        assert OTHERS.items() <= found.items(), f"others' files at step {step}"
        states = {"old" if found[name] == old[name] else "new" if found[name] == new[name] else name for name in new}
        assert states <= {"old", "new"}, f"{states} at step {step}"
        # A killed process cannot finish what it began: between two of its moves there are whole files of both kinds.
        assert number == signal.SIGKILL or len(states) == 1, f"{states} at step {step}"
        seen |= states
        for path in folder.glob("*.partial.*"):
            path.unlink()
        step += 1
    assert seen == {"old", "new"} and step > 8
    assert texts(folder) == new | OTHERS


def attempt_full_disk(video: Path, disk: Path) -> None:
    """Write more than a small disk holds."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "x", disk], check=True)
    old = {f"out.{suffix}": "old" for suffix in FORMATS}
    for name, text in old.items():
        (disk / name).write_text(text)
    scripted(pytest.MonkeyPatch(), lambda sample: "many words " * 1000)
    assert main([str(video), "--output", str(disk / "out"), "--quiet"]) == 1
    assert texts(disk) == old


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_ended_at_any_step(video, tmp_path, number):
    run = as_program("signals", int(number), video, tmp_path)
    assert run.returncode == 0, run.stderr


def test_full_disk(video, tmp_path):
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "x", tmp_path], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    run = as_program("full_disk", video, tmp_path, before=("unshare", "-m"))
    assert run.returncode == 0, run.stderr
    assert run.stderr.startswith("casa-caption: ") and "No space left on device" in run.stderr
    assert run.stderr.count("\n") == 1


if __name__ == "__main__":
    if sys.argv[1] == "signals":
        attempt_signals(int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        attempt_full_disk(Path(sys.argv[2]), Path(sys.argv[3]))
