"""A live session that goes on and on: pages, host memory and time per frame, beside the same for `insertion`.

    python benchmarks/live_soak.py insertion --output docs/live-soak
    python benchmarks/live_soak.py casa --frames 10000 --output docs/live-soak

The embedded model captions a video that never ends, as fast as the machine goes. A random checkpoint of the same
dimensions with fusion `insertion` does the same until its context is full. Written: OUTPUT.json, OUTPUT.svg.

Time per frame is what the client waits for, and processor time of all processes of the engine, which other work on
the machine hardly changes. Host memory is the resident memory of this process and the engine's.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from host_use import host_use
from PIL import Image
from soak_plot import plot

from casa_digits.cases import draw_video
from casa_digits.live import write_live_settings
from casa_engine.checkpoints import load_processor, random_model, read_config, save_checkpoint
from casa_engine.digits import checkpoint_path
from casa_serving.engine_defaults import environment, runs_on_cpu, set_environment
from casa_serving.live.session import FrameResult, LiveEngine, start_engine

INSERTION_CAPTION_TOKENS = 2


class PageMeter:
    """The most pages that the engine has reported since `reset`."""

    def __init__(self):
        from casa_vllm.metrics import ImageStatLogger

        self.reset()
        record = ImageStatLogger.record

        def and_note(logger, scheduler_stats=None, *args, **kwargs):
            if scheduler_stats is not None:
                # The baseline, which inserts image tokens, has none.
                self.image_pages = max(self.image_pages, logger.read().get("image_pages_in_use", 0))
                self.usage = max(self.usage, scheduler_stats.kv_cache_usage)
            return record(logger, scheduler_stats, *args, **kwargs)

        ImageStatLogger.record = and_note

    def reset(self):
        """Begin anew."""
        self.image_pages, self.usage = 0, 0.0


def scene(number, num_frames):
    """The frames that come next; none was seen before."""
    return [Image.fromarray(frame) for frame in draw_video(np.random.default_rng([11, number]), num_frames).frames]


async def soak(checkpoint, num_frames, every, rows, max_frame_tokens=None):
    """Append rows of measurements, one every so many frames; end early when the context is full."""
    meter = PageMeter()
    engine = await start_engine(checkpoint, disable_log_stats=False, enforce_eager=True)
    live = LiveEngine(engine, checkpoint, allow_insertion=True)
    settings = live.defaults
    if max_frame_tokens is not None:
        settings = replace(settings, max_frame_tokens=max_frame_tokens, text_budget=engine.model_config.max_model_len)
    session = await live.open(settings)
    results, frames, image_tokens, cpu_before, started = [], [], 0, 0.0, time.monotonic()
    try:
        for number in range(1, num_frames + 1):
            if not frames:
                frames = scene(number, every)
                cpu_before = host_use()[1]
            async for item in session.caption(frames.pop(0), number / settings.fps):
                if isinstance(item, FrameResult):
                    results.append(item)
            image_tokens += results[-1].image_tokens
            if number % every == 0:
                memory, cpu = host_use()
                rows.append(row(number, results, meter, engine, memory, (cpu - cpu_before) / len(results)))
                results = []
                meter.reset()
                print(json.dumps(rows[-1]), flush=True)
            read = session.transcript.num_tokens + (0 if live.config.is_cross_attention else image_tokens)
            if read + 64 > engine.model_config.max_model_len:
                break
        await session.close()
    finally:
        engine.shutdown()
    print(f"{number} frames in {time.monotonic() - started:.0f} s")


def row(number, results, meter, engine, memory_mib, cpu_s):
    """One row of measurements over the latest frames."""
    blocks = engine.vllm_config.cache_config.num_gpu_blocks
    return {
        "frame": number,
        "image_pages": meter.image_pages,
        "frame_pages": max(result.image_pages for result in results),
        "pages": round(meter.usage * (blocks - 1)),
        "memory_mib": round(memory_mib, 1),
        "ms": round(statistics.median(result.total_ms for result in results), 2),
        "ms_per_token": round(statistics.mean(r.total_ms / r.num_tokens for r in results), 2),
        "mean_ms": round(statistics.mean(result.total_ms for result in results), 2),
        "cpu_ms": round(1000 * cpu_s, 2),
        "text_tokens": max(result.text_tokens for result in results),
        "tokens": sum(result.num_tokens for result in results),
        "trims": sum(result.trimmed for result in results),
        "restarts": sum(result.restarted for result in results),
    }


def insertion_twin(folder):
    """A random checkpoint of the embedded model's dimensions whose images are tokens of the text."""
    config = read_config(checkpoint_path())
    config.fusion = "insertion"
    processor = load_processor(checkpoint_path())
    processor.fusion = "insertion"
    save_checkpoint(random_model(config), processor, folder)
    write_live_settings(folder)
    return folder


def compare(rows):
    """The end against frame 500: means over 500 frames around it and over the last 500."""
    early = [r for r in rows if 250 < r["frame"] <= 750] or rows[:1]
    late = rows[-5:]
    names = ("pages", "image_pages", "memory_mib", "ms", "mean_ms", "cpu_ms", "text_tokens")
    means = {name: [statistics.mean(r[name] for r in some) for some in (early, late)] for name in names}
    return {name: {"early": a, "late": b, "ratio": b / a if a else 1.0} for name, (a, b) in means.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fusion", choices=["insertion", "casa"], help="which of the two to measure")
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=Path("live-soak"), help="path without ending (%(default)s)")
    options = parser.parse_args()
    # What `casa-serve` sets for the embedded model goes for its twin as well; before vLLM is imported.
    on_cpu = runs_on_cpu()
    set_environment(environment(embedded=True, on_cpu=on_cpu, eager=on_cpu), live=False)
    rows = []
    try:
        if options.fusion == "casa":
            asyncio.run(soak(checkpoint_path(), options.frames, 100, rows))
        else:
            with tempfile.TemporaryDirectory() as folder:
                twin = insertion_twin(Path(folder))
                asyncio.run(soak(twin, options.frames, 10, rows, INSERTION_CAPTION_TOKENS))
    finally:
        # Also of a run that is interrupted.
        write(options.fusion, rows, options.output)


def write(fusion, rows, output):
    """Put the rows beside what the file holds of the other fusion; draw when both are there."""
    path = output.with_suffix(".json")
    report = json.loads(path.read_text()) if path.is_file() else {}
    report[fusion] = rows
    if fusion == "casa" and rows:
        report["ratios"] = compare(rows)
        for name, values in report["ratios"].items():
            print(f"{name:12} {values['early']:10.2f} {values['late']:10.2f} {values['ratio']:7.3f}")
    path.write_text(json.dumps(report, indent=1) + "\n")
    if report.get("casa") and report.get("insertion"):
        output.with_suffix(".svg").write_text(plot(report))


if __name__ == "__main__":
    main()
