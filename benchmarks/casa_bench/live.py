"""`casa bench live`: how many live sessions a server bears before the delay of a frame passes a bound.

Sessions of `/v1/live` (docs/live.md) show frames of noise by the clock, not by the answers: a server that is too slow
drops frames, which count as late. Their number doubles until p95 passes the bound, the server has no place for more
(--live-max-sessions, or its KV cache), or --max-sessions is reached; only the first says what the server bears.

`--load vss` is that of NVIDIA VSS's table: 8 frames a second, and 100 tokens about each 10 s. A frame is given one
token; each 10 s a question is asked, whose answer may have 100 tokens, and its delay is what is bounded.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from casa_bench.frames import jpeg, noise_frame
from casa_bench.statistics import percentile
from casa_bench.workload import Row, Settings, Workload, add_seed_option, bounded, shown
from casa_engine.errors import InputError

WARMUP_FRAMES = 4
QUESTION = "Describe what happened in the last ten seconds."
VSS_PERIOD_S = 10.0
# Beyond p95.
MAX_LATE_SHARE = 0.05


@dataclass(frozen=True)
class Load:
    """What a session does.

    Attributes:
        fps: Frames a second.
        bound_ms: Most delay at p95: of frames, or of answers where there are questions.
        settings: Settings of the session beside the server's own.
        question_s: Seconds between two questions; None for none.
    """

    fps: float
    bound_ms: float
    settings: dict[str, Any]
    question_s: float | None = None


LOADS = {
    "captions": Load(2.0, 500.0, {}),
    "vss": Load(8.0, 1000 * VSS_PERIOD_S, {"max_frame_tokens": 1, "max_answer_tokens": 100}, VSS_PERIOD_S),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--load", choices=LOADS, default="captions", help="captions: of each frame; vss: see above")
    parser.add_argument("--fps", type=bounded(0.1, 60.0), help="frames a second; default: 2, with --load vss 8")
    parser.add_argument(
        "--bound-ms", type=bounded(1.0, 600_000.0), help="of p95; default: the time between two frames, or 10 s for vss"
    )
    parser.add_argument("--max-sessions", type=bounded(1, 1024), default=64, help="most sessions tried (%(default)s)")
    parser.add_argument("--seconds", type=bounded(1.0, 3600.0), default=30.0, help="of each number (%(default)s)")
    parser.add_argument(
        "--image-size", type=bounded(28, 4096), default=448, help="side of the square frames, px (%(default)s)"
    )
    add_seed_option(parser)


def load_of(settings: Settings) -> Load:
    """Return the load that the options describe."""
    named = LOADS[settings["load"]]
    fps = settings["fps"] or named.fps
    bound_ms = settings["bound_ms"] or (named.bound_ms if named.question_s else 1000 / fps)
    return Load(fps, bound_ms, {**named.settings, "fps": fps}, named.question_s)


def run(server: str, settings: Settings) -> Iterator[Row]:
    """See `Workload`; `server` is its address. One row for each number of sessions.

    The last row's `ended_by` says why there is no more: "bound", "places" (the server takes no more) or "max_sessions".

    Raises:
        InputError: There is no such server, it has no live sessions or no place for one, or the time is too short for
            a question.
        LiveError: It refuses a session or a frame.
    """
    from websockets.exceptions import WebSocketException

    from casa_serving.live.protocol import LiveError

    load, sessions = load_of(settings), 1
    if load.question_s is not None and settings["seconds"] < load.question_s:
        raise InputError(
            f"--seconds is {settings['seconds']:g}; --load {settings['load']} asks its first question after "
            f"{load.question_s:g} s: measure at least as long."
        )
    row: Row | None = None
    while row is None or row["ended_by"] is None:
        try:
            measured = asyncio.run(_measure(server, settings, load, sessions))
        except LiveError as error:
            if error.code != "too_many_sessions":
                raise
            if row is None:
                raise InputError(f"{server!r} has no place for a single live session: {error}") from error
            # Known only now, and the row is with the caller already, so that Ctrl-C loses none.
            row["ended_by"] = "places"
            return
        except (OSError, WebSocketException) as error:
            raise InputError(f"the live sessions of {server!r} cannot be used: {error}") from error
        row = measured
        if not row["holds"]:
            row["ended_by"] = "bound"
        elif sessions == settings["max_sessions"]:
            row["ended_by"] = "max_sessions"
        yield row
        sessions = min(2 * sessions, settings["max_sessions"])


async def _measure(server: str, settings: Settings, load: Load, sessions: int) -> Row:
    # `sessions` too, since no number of them may show the frames of the one before.
    seeds = [(settings["seed"], sessions, place) for place in range(sessions)]
    shown = await asyncio.gather(
        *(_show(server, settings, load, seed, place / sessions / load.fps) for place, seed in enumerate(seeds))
    )
    frames_ms, answers_ms, sent_late_ms = (
        [each for result in shown for each in result[name]] for name in ("frames", "answers", "sent_late")
    )
    dropped, tokens = (sum(result[name] for result in shown) for name in ("dropped", "tokens"))
    # A frame that was never shown to the model is later than any.
    late = sum(each > load.bound_ms for each in frames_ms) + dropped if load.question_s is None else dropped
    holds = is_within(late, len(frames_ms) + dropped)
    if load.question_s is not None:
        holds = holds and is_within(sum(each > load.bound_ms for each in answers_ms), len(answers_ms))
    return {
        "sessions": sessions,
        "fps": load.fps,
        "bound_ms": load.bound_ms,
        "frames": len(frames_ms) + dropped,
        "dropped": dropped,
        "frame_p50_ms": percentile(frames_ms, 50),
        "frame_p95_ms": percentile(frames_ms, 95),
        "answers": len(answers_ms),
        "answer_p50_ms": percentile(answers_ms, 50),
        "answer_p95_ms": percentile(answers_ms, 95),
        "sent_late_p95_ms": percentile(sent_late_ms, 95),
        "tokens_per_s": tokens / settings["seconds"],
        "holds": holds,
        "ended_by": None,
    }


def is_within(late: int, total: int) -> bool:
    """Return whether p95 is within a bound that `late` of `total` delays pass."""
    return total > 0 and late <= MAX_LATE_SHARE * total


async def _frames(seed: tuple[int, ...], count: int, side_px: int) -> AsyncIterator[tuple[int, bytes]]:
    """Yield the frames of a video with their numbers; each is made while the one before waits for its time.

    No two are alike: a server keeps the pages of frames that it has seen, and encodes none again.
    """

    def make(number: int) -> asyncio.Task[bytes]:
        return asyncio.create_task(asyncio.to_thread(lambda: jpeg(noise_frame(seed, number, side_px))))

    upcoming = make(0)
    for number in range(count):
        frame = await upcoming
        if number + 1 < count:
            upcoming = make(number + 1)
        yield number, frame


async def _show(server: str, settings: Settings, load: Load, seed: tuple[int, ...], delay_s: float) -> dict[str, Any]:
    """Show one video by the clock; return delays of frames and answers, dropped frames and tokens after the warm-up.

    `sent_late` is how late frames were sent, in milliseconds: where that is much, this process is what is too slow.
    """
    from casa_serving.caption.captioners import live_url
    from casa_serving.live.client import LiveClient
    from casa_serving.live.protocol import AnswerDone, ErrorEvent, FrameDone, FrameDropped, LiveError

    num_frames = WARMUP_FRAMES + round(settings["seconds"] * load.fps)
    every = round(load.question_s * load.fps) if load.question_s else 0
    asked_s: dict[str, float] = {}
    result: dict[str, Any] = {"frames": [], "answers": [], "sent_late": [], "dropped": 0, "tokens": 0}

    async def read(client: LiveClient) -> None:
        async for event in client.events():
            if isinstance(event, ErrorEvent):
                raise LiveError(event.code, event.message)
            if isinstance(event, AnswerDone):
                result["answers"].append(1000 * (time.perf_counter() - asked_s[event.id or ""]))
                result["tokens"] += event.num_tokens
            elif isinstance(event, FrameDone) and event.frame >= WARMUP_FRAMES:
                result["frames"].append(event.delay_ms)
                result["tokens"] += event.num_tokens
            elif isinstance(event, FrameDropped) and event.frame >= WARMUP_FRAMES:
                result["dropped"] += 1

    async with LiveClient(live_url(server), api_key=settings["api_key"]) as client:
        await client.create(**load.settings)
        await asyncio.sleep(delay_s)
        reader = asyncio.create_task(read(client))
        begun_s = time.perf_counter()
        async for number, frame in _frames(seed, num_frames, settings["image_size"]):
            due_s = begun_s + number / load.fps
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            if reader.done():
                break
            if number >= WARMUP_FRAMES:
                result["sent_late"].append(1000 * (time.perf_counter() - due_s))
            await client.send_frame(frame, number / load.fps)
            if every and number % every == every - 1:
                asked_s[str(number)] = time.perf_counter()
                await client.ask(QUESTION, id=str(number))
        await client.stop()
        await reader
    return result


def summarize(rows: list[Row]) -> Row:
    """See `Workload`."""
    return {
        "most_sessions": max((row["sessions"] for row in rows if row["holds"]), default=0),
        "stopped_at": rows[-1]["sessions"] if rows and not rows[-1]["holds"] else None,
        "ended_by": rows[-1].get("ended_by") if rows else None,
        "last": rows[-1] if rows else None,
    }


def cells(summary: Row) -> list[str]:
    """See `Workload`."""
    last = summary["last"] or {}
    return [
        str(summary["most_sessions"]),
        shown(summary["stopped_at"]),
        summary.get("ended_by") or "-",
        shown(last.get("fps"), 1),
        shown(last.get("bound_ms")),
        shown(last.get("frames")),
        shown(last.get("dropped")),
        shown(last.get("frame_p95_ms")),
        shown(last.get("answer_p95_ms")),
        shown(last.get("sent_late_p95_ms")),
        shown(last.get("tokens_per_s"), 1),
    ]


LIVE = Workload(
    name="live",
    summary="Concurrent live sessions of a casa serve, until p95 passes a bound.",
    add_options=add_options,
    needs=None,
    run=run,
    summarize=summarize,
    columns=(
        "sessions within the bound",
        "first number beyond",
        "ended by",
        "fps",
        "bound, ms",
        "frames at the last number",
        "dropped",
        "frame p95, ms",
        "answer p95, ms",
        "sent late p95, ms",
        "tok/s of all",
    ),
    cells=cells,
)
