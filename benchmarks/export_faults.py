"""Kills `casa-export` at random moments and fills its disk; every time a good export must follow.

    python benchmarks/export_faults.py                      30 kills, 10 disks; about a quarter of an hour on one core
    python benchmarks/export_faults.py --trace-once         graphs are traced by the first export and copied after it

Each run replaces a good export of a tiny model, with files of others in the same folder. After the fault the folder
must hold the older export or the new one, whole (`ExportedModel.load`, which compares every hash), and all files of
others with their contents and inodes; then the next run must succeed and leave nothing of the one before. Disks are
tmpfs, sized so that so much is left, the export being a folder on the disk or the disk itself; where this user may
not mount, a limit on the size of a file stands for them.
"""

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.configuration import CasaConfig
from casa_engine.errors import CasaError
from casa_engine.presets import preset_config
from casa_export import cli, exporter, trt_builder  # noqa: F401  imported here once for all the forked exports
from casa_export.exported_model import ExportedModel

FOREIGN = {"notes.txt": "mine", "engines/timing.cache": "mine too", "results/run 1/answers.csv": "1,2"}
LIMITS = ["--no-validate", "--max-text-tokens", "160", "--max-image-tokens", "64"]
FULL = ("needs at least", "No space left on device", "File too large")
FORK = multiprocessing.get_context("fork")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def tiny_config() -> CasaConfig:
    """One layer of everything: tracing takes seconds."""
    config = preset_config("tiny-llama", fusion="ca")
    text = config.text_config.to_dict() | {"num_hidden_layers": 1, "layer_types": None}
    vision = config.vision_config.to_dict() | {"depth": 1, "fullatt_block_indexes": []}
    return CasaConfig(**(config.to_dict() | {"text_config": text, "vision_config": vision}))


@dataclass
class Folder:
    """An export with files of others.

    Attributes:
        path: The folder.
        checkpoint: What is exported.
        batch: Its `--max-batch`, another one for each export: distinguishes the older from the new.
        inodes: Of the files of others.
    """

    path: Path
    checkpoint: Path
    batch: int = 1
    inodes: dict[str, int] = field(default_factory=dict)

    def start(self, batch: int, limit: Callable[[], None] | None = None) -> BaseProcess:
        """Start an export with this `--max-batch`, its output in `log`."""
        arguments = [str(self.checkpoint), str(self.path), *LIMITS, f"--max-batch={batch}"]
        self.log.write_bytes(b"")
        process = FORK.Process(target=run_export, args=(arguments, self.log, limit))
        process.start()
        return process

    @property
    def log(self) -> Path:
        """Where an export writes what it prints."""
        return self.checkpoint.parent / "log"

    def prepare(self) -> None:
        """Make the first export and the files of others."""
        self.export()
        for name, text in FOREIGN.items():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_text(text)
        self.inodes = {name: (self.path / name).stat().st_ino for name in FOREIGN}

    def export(self) -> float:
        """Make a good export; return its seconds."""
        started = time.perf_counter()
        process = self.start(self.batch + 1)
        process.join()
        if process.exitcode:
            raise SystemExit(f"the export after the fault failed: {self.log.read_text()}")
        self.batch += 1
        return time.perf_counter() - started

    def lost(self) -> int:
        """Files of others that are missing or changed."""
        return sum(
            not (self.path / name).is_file()
            or (self.path / name).read_text() != text
            or (self.path / name).stat().st_ino != self.inodes[name]
            for name, text in FOREIGN.items()
        )

    def state(self) -> str:
        """What a reader finds: the older export, the new one, a refused folder or one that should be refused."""
        try:
            batch = ExportedModel.load(self.path, num_threads=1).limits.batch
        except CasaError:
            return "refused"
        return {self.batch: "older", self.batch + 1: "new"}.get(batch, "broken")

    def leftovers(self) -> list[str]:
        """Work folders that are still there."""
        return [str(path) for path in [*self.path.parent.glob(".*casa-work"), *self.path.glob(".casa-work")]]


def run_export(arguments: list[str], log: Path, limit: Callable[[], None] | None) -> None:
    """`casa-export` in a process of its own, forked where all is imported already."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))
    if limit:
        limit()
    sys.exit(cli.main(arguments))


def kill_once(folder: Folder, seconds: float, generator: random.Random) -> tuple[str, float]:
    """Start an export and send a signal at a random moment after its first step began.

    Returns:
        What happened, "" where the export ended first; and the seconds after which it ended.
    """
    number = generator.choice(SIGNALS)
    process = folder.start(folder.batch + 1)
    while b"[1/" not in folder.log.read_bytes() and process.is_alive():
        time.sleep(0.001)
    started = time.perf_counter()
    process.join(generator.uniform(0, seconds))
    step = folder.log.read_bytes().count(b"/6] ")
    if process.is_alive():
        os.kill(process.pid, number)
    process.join()
    shown = folder.log.read_text()
    if process.exitcode not in (0, 1, -signal.SIGKILL) or "Traceback" in shown:
        raise SystemExit(f"{number.name}: status {process.exitcode}\n{shown}")
    return f"{number.name} in step {step}" if process.exitcode else "", time.perf_counter() - started


def fill_once(folder: Folder, limit: Callable[[], None] | None) -> str:
    """Run an export that has not enough room; return its last words' kind."""
    process = folder.start(folder.batch + 1, limit)
    process.join()
    shown = folder.log.read_text()
    if process.exitcode == 0:
        return "enough room"
    last = shown.splitlines()[-1]
    if process.exitcode != 1 or "Traceback" in shown or not last.startswith("casa-export: "):
        raise SystemExit(shown)
    return next((words for words in FULL if words in last), last)


class Table:
    """Counts what happened and what was found, and prints a line for each fault."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def add(self, what: str, folder: Folder) -> None:
        """Look at the folder after a fault, make a good export and look again."""
        state, lost = folder.state(), folder.lost()
        if state == "new":
            folder.batch += 1
        folder.export()
        after = "good" if folder.state() == "older" else "bad"  # it is the older one for the next run
        lost_after, leftovers = folder.lost(), folder.leftovers()
        self.found.update({state: 1, "lost": lost + lost_after, "leftovers": len(leftovers), f"then {after}": 1})
        print(f"| {what} | {state} | {lost} | {after} | {lost_after} | {len(leftovers)} |", flush=True)


def kills(table: Table, work: Path, checkpoint: Path, count: int, generator: random.Random) -> None:
    """The random moments; an export that ended before its signal does not count."""
    folder = Folder(work / "killed", checkpoint)
    folder.prepare()
    seconds, killed = folder.export(), 0
    while killed < count:
        what, after = kill_once(folder, seconds, generator)
        if what:
            killed += 1
            table.add(f"{killed}: {what}", folder)
        else:
            seconds = after
            folder.batch += 1


def disks(table: Table, work: Path, checkpoint: Path, count: int) -> None:
    """The full disks: exports into a folder on one, and then into the disk itself."""
    for number, name in enumerate(("folder", "")):
        disk = work / f"disk {number}"
        disk.mkdir()
        rooms = [room_of(step, count // 2) for step in range(count // 2)]
        if subprocess.run(["mount", "-t", "tmpfs", "x", disk], capture_output=True).returncode:
            limit_files(table, Folder(disk / "out", checkpoint), rooms)
            continue
        try:
            fill_disk(table, Folder(disk / name, checkpoint), disk, rooms)
        finally:
            subprocess.run(["umount", disk], check=True)


def room_of(step: int, steps: int) -> float:
    """Room for an export, as a share of its size: half, then from nearly enough for the weights to nearly enough."""
    return 0.9 + 0.1 * step / steps if step else 0.5


def fill_disk(table: Table, folder: Folder, disk: Path, rooms: list[float]) -> None:
    """Shrink a tmpfs to what is in it and the room, for one run."""
    folder.prepare()
    size = sum(path.stat().st_size for path in folder.path.iterdir() if path.is_file())
    for share in rooms:
        known = os.statvfs(disk)
        size_bytes = (known.f_blocks - known.f_bfree) * known.f_frsize + int(share * size)
        subprocess.run(["mount", "-o", f"remount,size={size_bytes}", disk], check=True)
        what = fill_once(folder, None)
        subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
        table.add(
            f"{int(share * size) >> 10} KiB left, {'the disk' if folder.path == disk else 'a folder'}: {what}", folder
        )


def limit_files(table: Table, folder: Folder, rooms: list[float]) -> None:
    """Where nothing can be mounted: a limit on the size of each file."""
    folder.prepare()
    largest = max(path.stat().st_size for path in folder.path.iterdir())
    for share in rooms:
        room = int(share * largest)
        what = fill_once(folder, lambda room=room: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
        table.add(f"files up to {room >> 10} KiB: {what}", folder)


def trace_once(folder: Path) -> None:
    """Take graphs from an export that is there: what is left is the time in which an export writes."""
    exporter.export_graph = lambda model, spec, path: shutil.copyfile(folder / path.name, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--disks", type=int, default=10)
    parser.add_argument("--trace-once", action="store_true", help="kill while files are written, not while tracing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # tqdm's own lock is one for all forks: an export that is killed while it writes a progress bar keeps it for ever.
    tqdm.set_lock(threading.RLock())
    table = Table()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_random_checkpoint(tiny_config(), work / "checkpoint")
        if options.trace_once:
            traced = Folder(work / "traced", work / "checkpoint")
            traced.export()
            trace_once(traced.path)
        print("| fault | found | others' files lost | after the next run | lost | leftovers |")
        print("|---|---|---:|---|---:|---:|")
        kills(table, work, work / "checkpoint", options.kills, random.Random(options.seed))
        disks(table, work, work / "checkpoint", options.disks)
    print(", ".join(f"{name}: {count}" for name, count in sorted(table.found.items())))
    good = table.found["then good"] == options.kills + options.disks
    return 0 if good and not any(table.found[name] for name in ("lost", "broken", "refused", "leftovers")) else 1


if __name__ == "__main__":
    sys.exit(main())
