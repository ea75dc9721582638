"""The answers of a run, a line of JSON each, written as they come: what an interrupted run goes on from.

The first line says what was asked of which model; a run with other settings does not go on with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from casa_engine.atomic_files import replaced_atomically
from casa_engine.errors import InputError

FORMAT, VERSION = "casa-eval-samples", 1
MAX_LINE_BYTES = 4 * 2**20
Record = dict[str, Any]
Key = tuple[str, int]


class SampleLog:
    """Records of samples, on the disk; in memory is only where each stands.

    Args:
        path: Of the file. One that is there is gone on with: its answers are kept; its failures are not, so that they
            are asked again.
        settings: What a run that goes on must have in common with the one before.

    Raises:
        InputError: The file is of another run.
        OSError: It cannot be read or written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._places: dict[Key, int] = {}
        header = {"format": FORMAT, "version": VERSION, "settings": settings}
        if path.exists():
            self._keep_answers(header)
        else:
            with path.open("x") as new:
                new.write(json.dumps(header) + "\n")
        self._file = path.open("r+b")
        self._index()

    def __contains__(self, key: Key) -> bool:
        """Return whether a sample has a record."""
        return key in self._places

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._places)

    def add(self, record: Record) -> None:
        """Write a record, and hand it to the system, so that a killed run loses none."""
        self._file.seek(0, 2)
        self._places[record["task"], record["id"]] = self._file.tell()
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def read(self, key: Key) -> Record:
        """Return the record of a sample."""
        self._file.seek(self._places[key])
        return json.loads(self._file.readline())

    def records(self, task: str) -> Iterator[Record]:
        """Read the records of a task in the order of its samples."""
        for key in sorted(key for key in self._places if key[0] == task):
            yield self.read(key)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _keep_answers(self, header: Record) -> None:
        """Rewrite the file without failures, and without a line that was cut when its run was killed."""
        with self.path.open("rb") as old, replaced_atomically(self.path) as part, part.open("wb") as new:
            first = as_record(old.readline(MAX_LINE_BYTES))
            if first is None or first.get("format") != FORMAT or first.get("version") != VERSION:
                raise InputError(f"{self.path} holds no answers of casa eval; choose another --output.")
            given, asked = first.get("settings"), header["settings"]
            other = [name for name in asked if not isinstance(given, dict) or given.get(name) != asked[name]]
            if other:
                raise InputError(
                    f"{self.path} is of a run with another {' and '.join(other)}; expected the same to go on with it. "
                    "Choose another --output."
                )
            new.write(json.dumps(header).encode() + b"\n")
            while line := old.readline(MAX_LINE_BYTES):
                record = as_record(line)
                if record is not None and line.endswith(b"\n") and "error" not in record:
                    new.write(line)

    def _index(self) -> None:
        self._file.readline()
        place = self._file.tell()
        while line := self._file.readline():
            record = json.loads(line)
            self._places[record["task"], record["id"]] = place
            place = self._file.tell()


def refuse_existing(path: Path) -> None:
    """Raise InputError where there is a log already, which a run that does not go on with it would mix with its own."""
    if path.exists():
        raise InputError(f"{path} is there already: go on with it by --resume, or choose another --output.")


def as_record(line: bytes) -> Record | None:
    """Return a line's object, None where it is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
