"""`casa bench stream`: the published workload, a conversation that gets one frame and says 16 tokens a turn.

After Kyutai's `speed_bench_streaming.py`: frames of noise, greedy, exactly so many tokens a turn, a warm-up session of
two turns that is not counted; first and last are means over a tenth of the turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict

from casa_bench.backend import Backend, Needs
from casa_bench.frames import noise_frame
from casa_bench.statistics import first_and_last
from casa_bench.workload import Row, Settings, Workload, add_common_options, bounded, shown, shown_pair

WARMUP_TURNS = 2
# Of a turn beside its answer: the stop token and the delimiters of its image.
EXTRA_TOKENS = 8
PAIRS = ("ttft_ms", "tokens_per_s", "total_ms", "prepare_ms", "cpu_ms", "memory_bytes")
MIB = 2**20


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--turns", type=bounded(2, 10_000), default=256, help="frames (%(default)s; published: 512)")
    add_common_options(parser, tokens=16)


def needs(settings: Settings) -> Needs:
    """See `Workload`."""
    return Needs(settings["turns"], settings["image_size"], settings["tokens"] + EXTRA_TOKENS, has_new_images=True)


def run(backend: Backend, settings: Settings) -> Iterator[Row]:
    """See `Workload`; one row a turn."""
    yield from _session(backend, settings, settings["seed"] + 1, min(WARMUP_TURNS, settings["turns"]), is_counted=False)
    yield from _session(backend, settings, settings["seed"], settings["turns"], is_counted=True)


def _session(backend: Backend, settings: Settings, seed: int, turns: int, *, is_counted: bool) -> Iterator[Row]:
    stream = backend.open_stream()
    try:
        for number in range(turns):
            frame = noise_frame(seed, number, settings["image_size"])
            turn = stream.turn(frame, settings["tokens"])
            if is_counted:
                yield {"turn": number, **asdict(turn), "tokens_per_s": turn.tokens_per_s, "total_ms": turn.total_ms}
    finally:
        stream.close()


def summarize(rows: list[Row]) -> Row:
    """See `Workload`."""
    pairs = {name: first_and_last(row[name] for row in rows) for name in PAIRS}
    return {
        "turns": len(rows),
        **pairs,
        "kv_tokens": rows[-1]["kv_tokens"] if rows else None,
        "kv_bytes": rows[-1]["kv_bytes"] if rows else None,
    }


def cells(summary: Row) -> list[str]:
    """See `Workload`."""
    memory = summary["memory_bytes"]
    return [
        str(summary["turns"]),
        shown_pair(summary["ttft_ms"], 1),
        shown_pair(summary["tokens_per_s"], 1),
        shown_pair(summary["cpu_ms"], 1),
        shown(summary["kv_tokens"]),
        shown(summary["kv_bytes"]),
        shown_pair(None if memory is None else [each / MIB for each in memory]),
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
    ),
    cells=cells,
)
