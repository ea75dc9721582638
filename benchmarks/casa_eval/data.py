"""Local data sets, as they were published: folders of Parquet or JSONL files, read row by row.

FOLDER/chartqa/data/test-00000-of-00001.parquet     what a download of lmms-lab/ChartQA has
FOLDER/DocVQA/InfographicVQA/validation-*.parquet   the data set's own name does, too
FOLDER/chartqa/test.jsonl                           a row a line; `image` is a path beside it
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casa_engine.errors import InputError
from casa_eval.images import ImageSpool, read_cell
from casa_eval.tasks import IMAGE, Task

Row = Mapping[str, Any]
PARQUET, JSONL = ".parquet", ".jsonl"
# Rows held at once, images included.
BATCH_ROWS = 4
# Of one row of JSONL, whose image is a path.
MAX_LINE_BYTES = 4 * 2**20
# Files and folders looked at in a folder of data.
MAX_ENTRIES = 100_000


@dataclass(frozen=True)
class Sample:
    """One row: its number in the split, its columns, and where its image is."""

    index: int
    row: Row
    folder: Path


class DataSet:
    """One task's samples.

    Args:
        task: The task.
        root: The folder that was given.
        is_alone: Whether it may be the folder of this task itself: there is no other task.

    Raises:
        InputError: There are no files of this task, or they lack columns.
    """

    def __init__(self, task: Task, root: Path, *, is_alone: bool) -> None:
        if not root.is_dir():
            raise InputError(f"--data {root} is no folder; expected one with the data of {task.source}.")
        self.task = task
        self._spool: ImageSpool | None = None
        self._image_paths: list[Path] = []
        self._image_key = ""
        self.place, self.paths = find_files(task, task.config, root, is_alone=is_alone)
        columns = [*task.texts, *task.lists]
        if task.images and IMAGE not in column_names(self.paths[0]):
            folder, self._image_key, name = task.images
            self._image_paths = find_files(task, folder, root, is_alone=is_alone)[1]
            self.columns = (*columns, name)
            for path in self._image_paths:
                check_columns(path, (self._image_key, IMAGE))
        else:
            self.columns = (*columns, IMAGE)
        for path in self.paths:
            check_columns(path, self.columns)

    def samples(self) -> Iterator[Sample]:
        """Read the samples one after the other.

        Raises:
            InputError: A file is damaged, or there is no sample at all.
        """
        index = -1
        for path in self.paths:
            for row in rows_of(path, self.columns):
                index += 1
                yield Sample(index, row, path.parent)
        if index < 0:
            raise InputError(f"{self.place} holds no sample of {self.task.name}; expected at least one row.")

    def image(self, sample: Sample) -> bytes:
        """Return the image file of a sample.

        Raises:
            InputError: There is none, or it is too large.
        """
        if self._spool is not None:
            return self._spool.read(sample.row.get(self.columns[-1]))
        return read_cell(sample.row.get(IMAGE), sample.folder)

    @contextmanager
    def opened(self) -> Iterator[DataSet]:
        """Make the images of a second table ready for the time of the block."""
        if not self._image_paths:
            yield self
            return
        rows = (row for path in self._image_paths for row in rows_of(path, (self._image_key, IMAGE)))
        self._spool = ImageSpool(rows, self._image_key, self._image_paths[0].parent)
        try:
            yield self
        finally:
            self._spool.close()


def find_files(task: Task, config: str | None, root: Path, *, is_alone: bool) -> tuple[Path, list[Path]]:
    """Return the folder of a task, and the files of its split in their order.

    Args:
        task: The task.
        config: The folder of the data set that they are in, where it has several.
        root: The folder that was given.
        is_alone: Whether it may be the folder of this task itself.

    Raises:
        InputError: There are none.
    """
    own, shared = root / task.name, root / task.source.partition("/")[2]
    places = [each for each in (own, shared) if each.is_dir()] + ([root] if is_alone else [])
    for place in places:
        found = [path for path in walk(place) if is_of_split(path.name, task.split)]
        if place == root:
            # It may be the set's own folder, and must not be one of many sets: files of others have the same columns.
            found = [path for path in found if path.parent in (root, root / "data", root / str(config))]
        if config is not None:
            inside = [path for path in found if path.parent.name == config]
            # What is not sorted into folders is this task's where the folder is, and not where two tasks share it.
            plain = [path for path in found if path.parent == place and place != shared and config == task.config]
            found = inside or plain
        if of_kind := [path for path in found if path.suffix == PARQUET] or found:
            return place, of_kind
    folder = f"{config}/" if config else ""
    raise InputError(
        f"there is no {folder}{task.split}*{PARQUET} and no {folder}{task.split}*{JSONL} in {[*places, own][0]}; "
        f"expected the files of {task.source}, split {task.split} (docs/evaluation.md)."
    )


def walk(folder: Path) -> list[Path]:
    """Return all Parquet and JSONL files in a folder and those inside, in the order of their names.

    Raises:
        InputError: There are too many files to look through.
    """
    found, seen = [], 0
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        seen += len(names)
        if seen > MAX_ENTRIES:
            raise InputError(f"{folder} has more than {MAX_ENTRIES:,} files; name the folder of the data set itself.")
        found += [Path(where, name) for name in names if Path(name).suffix in (PARQUET, JSONL)]
    return sorted(found)


def is_of_split(name: str, split: str) -> bool:
    """Return whether a file's name is that of a split: test.parquet, test-00000-of-00004-0123456789abcdef.parquet."""
    return name.startswith((f"{split}.", f"{split}-", f"{split}_"))


def column_names(path: Path) -> list[str]:
    """Return the columns of a file: of JSONL, those of its first row.

    Raises:
        InputError: It is damaged.
    """
    if path.suffix == JSONL:
        return list(next(jsonl_rows(path), {}))
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is no Parquet file, or damaged: {one_line(error)}.") from error


def check_columns(path: Path, columns: tuple[str, ...]) -> None:
    """Check that a file has columns; an empty JSONL file has none, and no rows either.

    Raises:
        InputError: It lacks one.
    """
    names = column_names(path)
    missing = [name for name in columns if name not in names]
    if missing and (names or path.suffix == PARQUET):
        raise InputError(
            f"{path} lacks {', '.join(missing)}; it has the columns {', '.join(map(str, names))[:300]}. Download the "
            "set again, or name the columns so."
        )


def rows_of(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Read the rows of a file, a few at a time.

    Raises:
        InputError: It is damaged.
    """
    if path.suffix == JSONL:
        yield from jsonl_rows(path)
        return
    import pyarrow
    import pyarrow.parquet

    try:
        # A stream of pages: without a buffer, and ahead of need, a whole group of rows would be read.
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=list(columns), use_threads=False):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no Parquet file, or damaged: {one_line(error)}.") from error


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a JSONL file; blank lines are none.

    Raises:
        InputError: A line is no JSON object, or too long.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise InputError(
                    f"{path}, line {number} has more than {MAX_LINE_BYTES:,} bytes; expected an object a line, whose "
                    "image is a path."
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number} is no JSON; expected an object a line.") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number} is {type(row).__name__}; expected an object a line.")
            yield row


def one_line(error: Exception) -> str:
    """Return an error's words on one line, and not too many."""
    return " ".join(str(error).split())[:200].rstrip(".")
