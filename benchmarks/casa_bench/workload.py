"""What every workload is: settings, what it needs, the rows that it measures, and the cells of its table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from casa_bench.backend import Backend, Needs

# One measurement, as it is written to JSON.
Row = dict[str, Any]
# What was asked for, by option.
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Workload:
    """One workload.

    Attributes:
        name: Its subcommand.
        summary: One sentence for `--help`.
        add_options: Declares its options.
        needs: What it asks of a backend at most; None where it asks a server's live sessions.
        run: Measures; yields rows.
        summarize: Figures of the rows, for JSON and table.
        columns: Titles of the table behind model and backend.
        cells: The cells of these columns from a summary.
    """

    name: str
    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    needs: Callable[[Settings], Needs] | None
    run: Callable[[Backend | str, Settings], Iterator[Row]]
    summarize: Callable[[list[Row]], Row]
    columns: tuple[str, ...]
    cells: Callable[[Row], list[str]]


def bounded(low: float, high: float) -> Callable[[str], Any]:
    """Return a type for argparse: a number of the kind of `low`, within bounds."""
    kind = type(low)

    def read(word: str) -> Any:
        try:
            value = kind(word)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{word!r}: expected a number from {low:,} to {high:,}")
        return value

    return read


def add_common_options(parser: argparse.ArgumentParser, tokens: int) -> None:
    """Declare what all workloads of conversations have."""
    parser.add_argument(
        "--image-size", type=bounded(28, 4096), default=896, help="side of the square frames, px (%(default)s)"
    )
    parser.add_argument("--tokens", type=bounded(2, 1024), default=tokens, help="tokens an answer (%(default)s)")
    add_seed_option(parser)


def add_seed_option(parser: argparse.ArgumentParser) -> None:
    """Declare the seed of the frames."""
    parser.add_argument(
        "--seed",
        type=bounded(0, 2**31),
        default=0,
        help="of the frames (%(default)s); a server may have those of an earlier run in its cache: give it new ones",
    )


def shown(value: float | None, digits: int = 0) -> str:
    """Return a number for a table, "-" for what was not seen."""
    return "-" if value is None else f"{value:,.{digits}f}"


def shown_pair(pair: tuple[float, float] | list[float] | None, digits: int = 0) -> str:
    """Return "first -> last" for a table."""
    return "-" if pair is None else f"{pair[0]:,.{digits}f} -> {pair[1]:,.{digits}f}"
