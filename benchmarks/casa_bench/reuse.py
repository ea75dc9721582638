"""`casa bench reuse`: several questions about one image, each in a conversation of its own, one after the other.

The first question pays for the image: decoding, preprocessing, the vision encoder, its keys and values. What the second
one pays is what an engine does not remember of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from casa_bench.backend import Backend, Needs
from casa_bench.chat import EXTRA_TOKENS, user_message
from casa_bench.frames import noise_frame
from casa_bench.statistics import percentile
from casa_bench.workload import Row, Settings, Workload, add_common_options, bounded, shown


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--images", type=bounded(1, 1000), default=5, help="one after the other (%(default)s)")
    parser.add_argument("--questions", type=bounded(2, 1000), default=4, help="about each (%(default)s)")
    add_common_options(parser, tokens=16)


def needs(settings: Settings) -> Needs:
    """See `Workload`."""
    return Needs(1, settings["image_size"], settings["tokens"] + EXTRA_TOKENS)


def run(backend: Backend, settings: Settings) -> Iterator[Row]:
    """See `Workload`; one row an image, after one that is not counted."""
    for number in range(settings["images"] + 1):
        frame = noise_frame(settings["seed"], number, settings["image_size"])
        asked = [[user_message(frame, f"Question {place}: what is it?")] for place in range(settings["questions"])]
        answers = [backend.answer([messages], settings["tokens"])[0] for messages in asked]
        if number:
            yield {"image": number, "ttft_ms": [each.ttft_ms for each in answers]}


def summarize(rows: list[Row]) -> Row:
    """See `Workload`."""
    first, second = ([row["ttft_ms"][place] for row in rows] for place in (0, 1))
    later = [each for row in rows for each in row["ttft_ms"][1:]]
    medians = percentile(first, 50), percentile(second, 50)
    return {
        "images": len(rows),
        "questions": len(rows[0]["ttft_ms"]) if rows else None,
        "first_ms": medians[0],
        "second_ms": medians[1],
        "later_ms": percentile(later, 50),
        "second_of_first": medians[1] / medians[0] if rows else None,
    }


def cells(summary: Row) -> list[str]:
    """See `Workload`."""
    return [
        str(summary["images"]),
        shown(summary["questions"]),
        shown(summary["first_ms"], 1),
        shown(summary["second_ms"], 1),
        shown(summary["later_ms"], 1),
        f"{shown(summary['second_of_first'], 3)}x",
    ]


REUSE = Workload(
    name="reuse",
    summary="Several questions about one image: what the second one costs.",
    add_options=add_options,
    needs=needs,
    run=run,
    summarize=summarize,
    columns=(
        "images",
        "questions",
        "TTFT of the first question, ms",
        "of the second",
        "of all later ones",
        "second against first",
    ),
    cells=cells,
)
