"""`casa bench chat`: conversations about several images, some at once, each with its whole history.

All conversations ask at the same moment, and again when all are answered: turn after turn one more image and a question
about it. Times are a user's: from the question to the first token, preparation and waiting included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from casa_bench.backend import Backend, Message, Needs
from casa_bench.frames import noise_frame
from casa_bench.statistics import first_and_last, percentile
from casa_bench.workload import Row, Settings, Workload, add_common_options, bounded, shown, shown_pair

QUESTION = "What is new in this image?"
# Of a turn beside its answer: question, roles, delimiters, spelt by a tokenizer of bytes.
EXTRA_TOKENS = 128


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--concurrency", type=bounded(1, 256), default=4, help="conversations at once (%(default)s)")
    parser.add_argument("--turns", type=bounded(1, 256), default=8, help="images of each (%(default)s)")
    add_common_options(parser, tokens=64)


def needs(settings: Settings) -> Needs:
    """See `Workload`."""
    # What was said is spelt anew in the next turn, at worst a token a byte.
    tokens = 4 * settings["tokens"] + EXTRA_TOKENS
    return Needs(settings["turns"], settings["image_size"], tokens, settings["concurrency"])


def run(backend: Backend, settings: Settings) -> Iterator[Row]:
    """See `Workload`; one row a turn of all conversations."""
    for _ in _turns(backend, settings, first_seed=settings["seed"] + 1_000_000, turns=1):
        continue
    yield from _turns(backend, settings, first_seed=settings["seed"], turns=settings["turns"])


def _turns(backend: Backend, settings: Settings, first_seed: int, turns: int) -> Iterator[Row]:
    chats: list[list[Message]] = [[] for _ in range(settings["concurrency"])]
    for number in range(turns):
        for place, messages in enumerate(chats):
            frame = noise_frame(first_seed + place, number, settings["image_size"])
            messages.append(user_message(frame, QUESTION))
        begun_s = time.perf_counter()
        answers = backend.answer(chats, settings["tokens"])
        seconds = time.perf_counter() - begun_s
        for messages, answer in zip(chats, answers, strict=True):
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer.text}]})
        yield {
            "turn": number,
            "seconds": seconds,
            "ttft_ms": [answer.ttft_ms for answer in answers],
            "total_ms": [answer.total_ms for answer in answers],
            "tokens": [answer.tokens for answer in answers],
        }


def user_message(frame: object, question: str) -> Message:
    """Return a message of an image and a question about it."""
    return {"role": "user", "content": [{"type": "image", "image": frame}, {"type": "text", "text": question}]}


def summarize(rows: list[Row]) -> Row:
    """See `Workload`."""
    ttft_ms = [each for row in rows for each in row["ttft_ms"]]
    seconds, tokens = sum(row["seconds"] for row in rows), sum(sum(row["tokens"]) for row in rows)
    return {
        "turns": len(rows),
        "concurrency": len(rows[0]["ttft_ms"]) if rows else None,
        "ttft_p50_ms": percentile(ttft_ms, 50),
        "ttft_p95_ms": percentile(ttft_ms, 95),
        "ttft_ms": first_and_last(percentile(row["ttft_ms"], 50) for row in rows),
        "answers_per_s": len(ttft_ms) / seconds if seconds else None,
        "tokens_per_s": tokens / seconds if seconds else None,
    }


def cells(summary: Row) -> list[str]:
    """See `Workload`."""
    return [
        shown(summary["concurrency"]),
        str(summary["turns"]),
        shown(summary["ttft_p50_ms"], 1),
        shown(summary["ttft_p95_ms"], 1),
        shown_pair(summary["ttft_ms"], 1),
        shown(summary["answers_per_s"], 2),
        shown(summary["tokens_per_s"], 1),
    ]


CHAT = Workload(
    name="chat",
    summary="Conversations about several images, some at once.",
    add_options=add_options,
    needs=needs,
    run=run,
    summarize=summarize,
    columns=(
        "at once",
        "turns",
        "TTFT p50, ms",
        "TTFT p95, ms",
        "TTFT p50, ms, first -> last tenth",
        "answers/s",
        "tok/s of all",
    ),
    cells=cells,
)
