"""Live sessions in an engine of a preset's size: `sessions.py RESULTS PRESET [--measure sessions flat] [--tiny]`.

sessions    how many are captioned at 2 frames a second before the delay of a frame passes 500 ms at p95
flat        one session as fast as it goes: a frame's time at frame 100 and at frame 10,000

Both in one engine, whose start takes a minute. It has the defaults of `casa serve` and random weights, and sessions are
those of /v1/live with the published captioner's rules. They are opened in this process, without HTTP, WebSockets and
JPEG (`casa bench live` has these), and whatever the engine has room for: for how many it has is a row beside them.
Frames are noise, none is shown twice. A random model never stops by itself: each caption has its 20 tokens.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_engine import write_checkpoint
from live_ramp import FPS, GOLDEN, Ramp
from PIL import Image
from rows import Rows, leave

from casa_bench.live import MAX_LATE_SHARE
from casa_bench.statistics import percentile
from casa_engine.configuration import CasaConfig
from casa_engine.live.settings import LiveSettings
from casa_engine.live.transcript import HistoryItem
from casa_engine.presets import preset_config
from casa_serving.engine_defaults import engine_arguments, runs_on_cpu, set_environment
from casa_serving.live.session import FrameResult, LiveEngine

# Text tokens of a frame beside its caption.
FRAME_TOKENS = 4


@dataclass(frozen=True)
class Load:
    """What is shown, and for how long.

    Attributes:
        side: Pixels of a square frame.
        numbers: Sessions at once, ascending.
        fewer: Those that are tried where the first number is too many.
        first_s: Before the first number is counted, for whatever happens once.
        spread_s: In which a number's new sessions open.
        settle_s: From then until frames are counted.
        seconds: In which they are.
        frames: Of the flat session.
        window: How many of them are compared at both ends.
        seconds_flat: After which the flat session ends, wherever it is.
    """

    side: int
    numbers: tuple[int, ...]
    fewer: tuple[int, ...]
    first_s: float
    spread_s: float
    settle_s: float
    seconds: float
    frames: int
    window: int
    seconds_flat: float


FULL = Load(448, (64, 128, 192, 256, 320, 384), (8, 16, 32), 4.0, 3.0, 1.5, 8.0, 10_000, 100, 100.0)
TINY = Load(56, (1, 2), (1,), 2.0, 1.0, 0.5, 4.0, 60, 10, 60.0)


class Noise:
    """Frames of noise, each another: cut from one larger picture at places of its own."""

    def __init__(self, side: int) -> None:
        self._side = side
        self._picture = np.random.default_rng(0).integers(0, 255, (side + 1000, side + 1000, 3), dtype=np.uint8)
        self._count = 0

    def next(self) -> Image.Image:
        """Return the next frame; a million differ."""
        top, left = divmod(self._count % 1_000_000, 1000)
        self._count += 1
        return Image.fromarray(self._picture[top : top + self._side, left : left + self._side])


async def result_of(session: Any, frame: Image.Image, timestamp: float, arrived_s: float | None) -> FrameResult:
    """Caption one frame."""
    result = None
    async for item in session.caption(frame, timestamp, arrived_s):
        result = item
    assert isinstance(result, FrameResult)
    return result


def said_before(settings: LiveSettings, place: int) -> list[HistoryItem]:
    """Return captions that fill a session's text from half of its budget to all of it, as its place has it.

    A trim leaves half. Of sessions that began together all would be trimmed together, and none in a short measurement.
    Each has words of its own: the engine finds text again that another session has read, and a trim would cost nothing.
    """
    caption = f"{place} says: and so it goes on and on and on"[: settings.max_frame_tokens]  # a token a character
    num_tokens = settings.text_budget * (1 + place * GOLDEN % 1) / 2
    number = int(num_tokens / (settings.max_frame_tokens + FRAME_TOKENS)) - 1
    return [HistoryItem(caption=caption, timestamp=index / FPS) for index in range(number)]


async def count_sessions(live: LiveEngine, load: Load, rows: Rows, name: str, numbers: Sequence[int]) -> int:
    """Have more and more sessions; return the most of these numbers within the bound, 0 where none is."""
    noise, most = Noise(load.side), 0

    async def open_session(place: int) -> Any:
        return await live.open(replace(live.defaults, fps=FPS), said_before(live.defaults, place))

    async def caption(session: Any, timestamp: float, due_s: float) -> FrameResult:
        return await result_of(session, noise.next(), timestamp, due_s)

    ramp = Ramp(open_session, caption)
    for number in numbers:
        await ramp.grow(number, load.spread_s)
        await asyncio.sleep(load.settle_s + (load.first_s if number == numbers[0] else 0.0))
        count = await ramp.count(load.seconds)
        case = f"{name}, {number} sessions at {FPS:g} fps, {load.side} px"
        if count.frames:
            delays = [frame.delay_ms for frame in count.frames]
            rows.add("frame's delay, p95", case, percentile(delays, 95))
            rows.add("frame's delay, p50", case, percentile(delays, 50))
        num_tokens = sum(frame.num_tokens for frame in count.frames)
        rows.add("tokens a second of all", case, num_tokens / load.seconds, "tokens/s")
        rows.add("trims of all", case, sum(frame.is_trimmed for frame in count.frames), "")
        rows.add("late or dropped", case, 100 * count.late_share, "%")
        if count.late_share > MAX_LATE_SHARE:
            break
        most = number
        rows.add("sessions within the bound, so far", name, most, "")
    if num_failed := await ramp.close():
        rows.add("sessions that failed, see the log", name, num_failed, "")
    return most


async def measure_sessions(live: LiveEngine, load: Load, rows: Rows, name: str) -> None:
    """More and more sessions until more frames are late than may be."""
    # By its pages and its number of sequences; `casa serve` takes 8 unless --live-max-sessions says more.
    rows.add("sessions that fit into the engine", name, live.capacity(live.defaults), "")
    most = await count_sessions(live, load, rows, name, load.numbers)
    if not most:
        most = await count_sessions(live, load, rows, name, load.fewer)
    rows.add("sessions within the bound", name, most, "")


async def measure_flat(live: LiveEngine, load: Load, rows: Rows, name: str) -> None:
    """One session of two tokens a frame; its text is trimmed to the budget again and again."""
    noise, times = Noise(load.side), []
    session = await live.open(replace(live.defaults, max_frame_tokens=2))
    begun_s = time.monotonic()
    while len(times) < load.frames and time.monotonic() - begun_s < load.seconds_flat:
        times.append((await result_of(session, noise.next(), len(times) / FPS, None)).total_ms)
        if len(times) % 1000 == 0:  # Known even if the stage is cut off.
            case = f"{name}, the last {load.window} before frame {len(times):,}"
            rows.add("a frame's time", case, statistics.median(times[-load.window :]))
    await session.close()
    window = min(load.window, len(times) // 2)
    first, last = (statistics.median(part) for part in (times[window : 2 * window] or times, times[-window:]))
    rows.add("frames of one session", f"{name}, of {load.frames:,} in at most {load.seconds_flat:g} s", len(times), "")
    rows.add("a frame's time", f"{name}, frames {window} to {2 * window}", first)
    rows.add("a frame's time", f"{name}, the last {window} before frame {len(times):,}", last)
    rows.add("ratio of both", name, last / first, "")


def start_engine(folder: Path, config: CasaConfig, given: dict[str, Any]) -> Any:
    """Start an engine in a process of its own with the defaults of `casa serve`, which needs weights."""
    arguments, variables = engine_arguments(config, embedded=False, on_cpu=runs_on_cpu(), live=True, given=given)
    set_environment(variables, live=False)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    # vLLM chooses a step's tokens by it, and with them the images of a step.
    context = UsageContext.OPENAI_API_SERVER
    return AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), **arguments), usage_context=context)


MEASUREMENTS = {"sessions": measure_sessions, "flat": measure_flat}


async def measure(options: argparse.Namespace) -> None:
    load = TINY if options.tiny else FULL
    config = preset_config(options.preset, architectures=["CasaForConditionalGeneration"])
    folder = write_checkpoint(config, is_plain=False)
    given = {
        "load_format": "dummy",
        "dtype": "float32" if options.tiny else "bfloat16",
        "enforce_eager": options.tiny,
        "mm_processor_cache_gb": 0,
    }
    start, rows = time.perf_counter(), Rows(options.results)
    engine = start_engine(folder, config, given)
    rows.add("start of the engine", options.preset, time.perf_counter() - start, "s")
    try:
        for measurement in options.measure:
            await MEASUREMENTS[measurement](LiveEngine(engine, folder), load, rows, options.preset)
    finally:
        engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("preset")
    parser.add_argument("--measure", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--tiny", action="store_true", help="on a CPU")
    asyncio.run(measure(parser.parse_args()))
    leave()


if __name__ == "__main__":
    main()
