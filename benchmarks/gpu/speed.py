"""An engine of a preset's size: does it load; decode steps; first tokens of frames. Random weights.

`python speed.py RESULTS MODEL [--mode graphs] [--measure load first_token decode] [--tiny]`: one model a process, so
that each starts with an empty device. MODEL is a preset or "plain:PRESET" (see bench_engine.py). `--measure kernels`
tells where the time of the two others goes.
"""

import argparse
import statistics
import time
from pathlib import Path

from bench_engine import MODES, BenchEngine, triton_compilations
from floors import decode_work, first_token_floor_ms, hardware
from kernel_times import measure_kernels
from live_request import LiveRequest
from rows import Rows, leave
from sizes import PREFILL_TOKENS, Sizes, num_image_tokens, sizes

WARM_TOKENS = 4
# Of the live session in `load`.
FRAMES, FRAME_TOKENS = 4, 20


def measure_load(bench: BenchEngine, sizes: Sizes, rows: Rows, name: str) -> None:
    """The room for text, and a first request and a first live session, in which nothing is compiled."""
    rows.add("KV cache without images", name, bench.vllm_config.cache_config.kv_cache_size_tokens or 0, "tokens")
    side = sizes.sides[0]

    def ask() -> None:
        bench.add(bench.prompt(side), 16)
        bench.finish()

    def caption() -> None:
        session = LiveRequest(bench, "live")
        for _ in range(FRAMES):
            session.show(bench.frame(side), FRAME_TOKENS)
        session.close()

    requests = {"first request, 16 tokens": ask, f"first live session, {FRAMES} frames": caption}
    for what, request in requests.items():
        with triton_compilations() as compiled:
            start = time.perf_counter()
            request()
        rows.add(what, name, (time.perf_counter() - start) * 1e3)
        rows.add(f"kernels compiled in it {compiled or ''}".strip(), name, len(compiled), "")


def measure_first_token(bench: BenchEngine, sizes: Sizes, rows: Rows, name: str) -> None:
    """From a preprocessed frame to its first token; preprocessing beside it."""
    for side in sizes.sides:
        prepared, answered = [], []
        for _ in range(sizes.frames):
            start = time.perf_counter()
            prompt = bench.prompt(side)
            prepared.append((time.perf_counter() - start) * 1e3)
            start = time.perf_counter()
            bench.add(prompt, 1)
            bench.finish()
            answered.append((time.perf_counter() - start) * 1e3)
        floor = first_token_floor_ms(bench.config, side, PREFILL_TOKENS, hardware())
        rows.add("first token", f"{name}, {side} px", statistics.median(answered[2:] or answered), floor=floor)
        rows.add("preprocessing on the CPU", f"{name}, {side} px", statistics.median(prepared))


def decode_ms(bench: BenchEngine, num_seqs: int, side: int, num_tokens: int) -> tuple[float, float]:
    """Decode sequences with an image each; measured from when all of them decode until the first ends.

    Returns:
        Milliseconds of a step, and those in which this thread, which prepares steps and processes what they return, had
        a processor: it sleeps while it waits for the device. A step that takes no longer than the latter is the host's.
    """
    for prompt in [bench.prompt(side) for _ in range(num_seqs)]:
        bench.add(prompt, num_tokens)
    lengths: dict[str, int] = {}
    start = host_start = tokens_before = 0
    while bench.engine.has_unfinished_requests():
        for output in bench.engine.step():
            lengths[output.request_id] = len(output.outputs[0].token_ids)
        if not start and len(lengths) == num_seqs and min(lengths.values()) >= WARM_TOKENS:
            start, host_start, tokens_before = time.perf_counter(), time.thread_time(), sum(lengths.values())
        if start and max(lengths.values()) >= num_tokens:
            break  # the first to end leaves a smaller batch behind
    seconds, host_seconds = time.perf_counter() - start, time.thread_time() - host_start
    num_steps = (sum(lengths.values()) - tokens_before) / num_seqs
    bench.finish()
    return seconds * 1e3 / num_steps, host_seconds * 1e3 / num_steps


def measure_decode(bench: BenchEngine, sizes: Sizes, rows: Rows, name: str) -> None:
    """Decode steps of growing batches. A plain model has the text alone."""
    side = sizes.sides[-1]
    decode_ms(bench, 1, side, 2 * WARM_TOKENS)
    for num_seqs in sizes.num_seqs:
        step_ms, host_ms = decode_ms(bench, num_seqs, side, sizes.decode_tokens)
        text = PREFILL_TOKENS + sizes.decode_tokens // 2
        image_tokens = num_image_tokens(bench.config, side)
        work = decode_work(bench.config, num_seqs, image_tokens, text, is_plain=bench.is_plain)
        image = "" if bench.is_plain else f", {side} px image each"
        case = f"{name}, {num_seqs} sequences{image}"
        rows.add("decode step", case, step_ms, floor=work.floor_ms(hardware()))
        rows.add("host's processor time of it", case, host_ms)


MEASUREMENTS = {
    "load": measure_load,
    "first_token": measure_first_token,
    "decode": measure_decode,
    "kernels": measure_kernels,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("model")
    parser.add_argument("--mode", choices=MODES, default="graphs")
    parser.add_argument("--measure", nargs="+", choices=MEASUREMENTS, default=["load", "first_token", "decode"])
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in float32")
    options = parser.parse_args()
    rows, of = Rows(options.results), sizes(is_tiny=options.tiny)
    start = time.perf_counter()
    bench = BenchEngine(options.model, of, options.mode)
    name = options.model if options.mode == "graphs" else f"{options.model} ({options.mode})"
    rows.add("start of the engine", name, time.perf_counter() - start, "s")
    for measurement in options.measure:
        MEASUREMENTS[measurement](bench, of, rows, name)
    leave()


if __name__ == "__main__":
    main()
