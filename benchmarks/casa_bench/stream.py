"""`casa bench stream`: the published workload, a conversation that gets one frame and says 16 tokens a turn.

After Kyutai's `speed_bench_streaming.py`: frames of noise, greedy, exactly so many tokens a turn, a warm-up session of
two turns that is not counted; first and last are means over a tenth of the turns.

A machine whose speed changes between the two says nothing about growth so. `--paired-turns` goes on with the long
stream while a fresh one begins, a turn of each by turns, and compares neighbours.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict

from casa_bench.backend import Backend, Needs, Stream
from casa_bench.frames import noise_frame
from casa_bench.statistics import first_and_last
from casa_bench.workload import Row, Settings, Workload, add_common_options, bounded, shown, shown_pair

WARMUP_TURNS = 2
# Of a turn beside its answer: the stop token and the delimiters of its image.
EXTRA_TOKENS = 8
PAIRS = ("ttft_ms", "tokens_per_s", "total_ms", "prepare_ms", "cpu_ms", "memory_bytes")
PAIRED = ("ttft_ms", "total_ms", "cpu_ms")
MIB = 2**20


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--turns", type=bounded(2, 10_000), default=256, help="frames (%(default)s; published: 512)")
    parser.add_argument(
        "--paired-turns",
        type=bounded(0, 1000),
        default=0,
        help="turns more, each beside one of a fresh stream: growth without the machine's own (%(default)s)",
    )
    add_common_options(parser, tokens=16)


def needs(settings: Settings) -> Needs:
    """See `Workload`."""
    turns, paired = settings["turns"], settings["paired_turns"]
    answer = settings["tokens"] + EXTRA_TOKENS
    return Needs(turns + paired, settings["image_size"], answer, has_new_images=True)


def run(backend: Backend, settings: Settings) -> Iterator[Row]:
    """See `Workload`; one row a turn."""
    turns, seed = settings["turns"], settings["seed"]
    with closing(backend.open_stream()) as warm_up:
        for number in range(min(WARMUP_TURNS, turns)):
            _turn(warm_up, settings, seed + 1, number)
    with closing(backend.open_stream()) as stream:
        for number in range(turns):
            yield _turn(stream, settings, seed, number)
        if settings["paired_turns"]:
            with closing(backend.open_stream()) as fresh:
                yield from _pairs(stream, fresh, settings)


def _pairs(stream: Stream, fresh: Stream, settings: Settings) -> Iterator[Row]:
    """Yield further turns of a long stream, each with a fresh stream's of the same moment; who is first alternates."""
    for number in range(settings["paired_turns"]):
        measured = {}
        for each in (stream, fresh) if number % 2 else (fresh, stream):
            is_long = each is stream
            at = settings["turns"] + number if is_long else number
            measured[is_long] = _turn(each, settings, settings["seed"] + (0 if is_long else 2), at)
        yield {**measured[True], "fresh": measured[False]}


def _turn(stream: Stream, settings: Settings, seed: int, number: int) -> Row:
    turn = stream.turn(noise_frame(seed, number, settings["image_size"]), settings["tokens"])
    return {"turn": number, **asdict(turn), "tokens_per_s": turn.tokens_per_s, "total_ms": turn.total_ms}


def summarize(rows: list[Row]) -> Row:
    """See `Workload`."""
    alone = [row for row in rows if "fresh" not in row]
    pairs = {name: first_and_last(row[name] for row in alone) for name in PAIRS}
    return {
        "turns": len(alone),
        **pairs,
        "kv_tokens": alone[-1]["kv_tokens"] if alone else None,
        "kv_bytes": alone[-1]["kv_bytes"] if alone else None,
        "beside_fresh": {name: _beside_fresh(rows, name) for name in PAIRED},
    }


def _beside_fresh(rows: list[Row], name: str) -> float | None:
    """Return the median of the ratios of neighbouring turns, long to fresh; None where none were measured."""
    ratios = [row[name] / row["fresh"][name] for row in rows if "fresh" in row and row[name] and row["fresh"][name]]
    return statistics.median(ratios) if ratios else None


def cells(summary: Row) -> list[str]:
    """See `Workload`."""
    memory = summary["memory_bytes"]
    # Reports of before 2026-11-27 have none.
    beside = [shown(summary.get("beside_fresh", {}).get(name), 2) for name in PAIRED]
    return [
        str(summary["turns"]),
        shown_pair(summary["ttft_ms"], 1),
        shown_pair(summary["tokens_per_s"], 1),
        shown_pair(summary["cpu_ms"], 1),
        shown(summary["kv_tokens"]),
        shown(summary["kv_bytes"]),
        shown_pair(None if memory is None else [each / MIB for each in memory]),
        "-" if beside == ["-"] * len(PAIRED) else " / ".join(beside),
    ]


STREAM = Workload(
    name="stream",
    summary="One conversation of frames, 16 tokens each: the published workload.",
    add_options=add_options,
    needs=needs,
    run=run,
    summarize=summarize,
    columns=(
        "turns",
        "TTFT, ms, first -> last tenth",
        "tok/s, first -> last",
        "processor ms a turn, first -> last",
        "KV tokens",
        "KV bytes",
        "peak memory (of KV: pages in use), MiB, first -> last",
        "beside a fresh stream: TTFT / turn / processor, x",
    ),
    cells=cells,
)
