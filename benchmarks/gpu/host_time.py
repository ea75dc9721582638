"""The host's share of an engine's steps: `python host_time.py MODEL [--mode graphs] [--sequences 1 32 128]`.

For stand-ins of the CUDA libraries (docs/gpu.md): the host does all of its work and kernels do none, so that a step's
time is the host's. Prints a line of JSON for the start and for each number of sequences: milliseconds of a decode step
(median, and the thread's processor time, which other work on the machine hardly changes), kernels launched beside
graphs, graphs replayed, kernels compiled in the first request.
"""

import argparse
import ctypes
import json
import statistics
import time
from typing import Any

from bench_engine import MODES, BenchEngine, triton_compilations
from rows import leave
from sizes import FULL

SETTLING_STEPS, TIMED_STEPS, MAX_TOKENS = 24, 100, 1500


class Launches:
    """What the stand-ins have counted; None under the real libraries."""

    def __init__(self) -> None:
        self._counters = {}
        for name, library in (
            ("fake_launches", "libcudart.so.13"),
            ("fake_cu_launches", "libcuda.so.1"),
            ("fake_replays", "libcudart.so.13"),
        ):
            counter = getattr(ctypes.CDLL(library), name, None)
            if counter is None:
                raise SystemExit(f"{library} is no stand-in: it counts no {name}. See docs/gpu.md.")
            counter.restype = ctypes.c_long
            self._counters[name] = counter

    def read(self) -> dict[str, int]:
        """Return totals: kernels launched by CUDA's runtime and by Triton, graphs replayed."""
        return {name.removeprefix("fake_"): counter() for name, counter in self._counters.items()}


def return_awaited_tokens(scheduler: Any) -> None:
    """Have steps return the tokens that the scheduler waits for: stand-ins "sample" anything, in any number."""
    stock = scheduler.update_from_output

    def update_from_output(scheduled: Any, output: Any) -> Any:
        for name, index in output.req_id_to_index.items():
            request = scheduler.requests.get(name)
            wanted = 0 if request is None else min(1, request.num_output_placeholders)
            output.sampled_token_ids[index] = output.sampled_token_ids[index][:wanted]
        return stock(scheduled, output)

    scheduler.update_from_output = update_from_output


def measure_decode(bench: BenchEngine, launches: Launches, num_seqs: int) -> dict[str, object]:
    """Time decode steps of sequences with an image each; the scheduler tells who runs."""
    scheduler = bench.engine.engine_core.engine_core.scheduler
    names = [bench.add(bench.prompt(448), MAX_TOKENS) for _ in range(num_seqs)]
    for _ in range(num_seqs + SETTLING_STEPS):
        bench.engine.step()
    before, wall_ms, cpu_ms = launches.read(), [], []
    for _ in range(TIMED_STEPS):
        wall, cpu = time.perf_counter(), time.thread_time()
        bench.engine.step()
        wall_ms.append((time.perf_counter() - wall) * 1e3)
        cpu_ms.append((time.thread_time() - cpu) * 1e3)
    counted = {name: (total - before[name]) / TIMED_STEPS for name, total in launches.read().items()}
    running = len(scheduler.running)
    bench.engine.abort_request(names)
    bench.finish(1000)
    return {
        "sequences": num_seqs,
        "running": running,
        "step_ms": round(statistics.median(wall_ms), 3),
        "cpu_ms": round(statistics.median(cpu_ms), 3),
        "a_step": {name: round(number, 1) for name, number in counted.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help='preset, or "plain:PRESET"')
    parser.add_argument("--mode", choices=MODES, default="graphs")
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 32, 128])
    options = parser.parse_args()
    launches, start = Launches(), time.perf_counter()
    bench = BenchEngine(options.model, FULL, options.mode)
    return_awaited_tokens(bench.engine.engine_core.engine_core.scheduler)
    about = {"model": options.model, "mode": options.mode}
    started_s = time.perf_counter() - start
    with triton_compilations() as compiled:
        before = launches.read()
        name = bench.add(bench.prompt(448), 4)
        for _ in range(8):
            bench.engine.step()
    first = {key: total - before[key] for key, total in launches.read().items()}
    bench.engine.abort_request([name])
    capacity = bench.vllm_config.cache_config.kv_cache_size_tokens
    about |= {"start_s": round(started_s, 1), "kv_tokens": capacity, "compiled": compiled, "first_request": first}
    print(json.dumps(about), flush=True)
    for num_seqs in options.sequences:
        print(json.dumps(measure_decode(bench, launches, num_seqs)), flush=True)
    leave()


if __name__ == "__main__":
    main()
