"""What steps of live sessions launch: `python live_steps.py MODEL [--mode compile] [--sessions 1 8 32 128]`.

For stand-ins of the CUDA libraries (docs/gpu.md), whose counters it reads. Requests with the captioner's sampling and
rules decode; then chunks arrive, each a frame of 448 px with a live frame's text. Prints a line of JSON for the start,
one for each number of sessions with the kernels that were compiled once they were there, and one for each kind of step:
kernels launched beside graphs and graphs replayed, of the model and of what is around it.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from typing import Any

from bench_engine import IMAGE, MODES, BenchEngine, triton_compilations
from host_time import Launches, return_awaited_tokens
from live_request import FRAME_TEXT, caption_params
from PIL import Image
from rows import leave
from sizes import FULL

from casa_bench.engine_backend import render

DECODE_STEPS, WAVES, MAX_TOKENS = 12, 3, 1500
# Of the chunks that arrive in one step, and the tokens of one.
CHUNKS, CHUNK_TOKENS = (1, 8, 16), 20


class CountedSteps:
    """Counts what each step of an engine launches.

    Args:
        core: vLLM's engine core, in this process.
        launches: The stand-ins' counters.

    Attributes:
        steps: Of each kind of step (requests that decode, chunks, images), its counts.
    """

    def __init__(self, core: Any, launches: Launches) -> None:
        runner = core.model_executor.driver_worker.worker.model_runner
        self.steps: dict[tuple[int, int, int], list[dict[str, int]]] = defaultdict(list)
        self._launches = launches
        self._execute, self._sample = runner.execute_model, runner.sample_tokens
        runner.execute_model, runner.sample_tokens = self._execute_model, self._sample_tokens

    def _execute_model(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        lens = scheduled.num_scheduled_tokens.values()
        images = sum(len(indices) for indices in scheduled.scheduled_encoder_inputs.values())
        self._kind = (sum(length == 1 for length in lens), sum(length > 1 for length in lens), images)
        self._before = self._launches.read()
        return self._execute(scheduled, *args, **kwargs)

    def _sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        result = self._sample(*args, **kwargs)
        after = self._launches.read()
        self.steps[self._kind].append({name: after[name] - self._before[name] for name in after})
        return result

    def lines(self) -> list[dict[str, Any]]:
        """Return each kind's median counts."""
        return [
            {
                "decoding": decoding,
                "chunks": chunks,
                "images": images,
                "steps": len(counts),
                **{name: statistics.median(count[name] for count in counts) for name in counts[0]},
            }
            for (decoding, chunks, images), counts in sorted(self.steps.items())
        ]


class Sessions:
    """Requests that are sampled as the published captioner samples.

    Args:
        bench: Where they go.
    """

    def __init__(self, bench: BenchEngine) -> None:
        self._bench, self._count, self._params = bench, 0, caption_params(MAX_TOKENS)
        self._picture = Image.new("RGB", (448, 448))

    def add(self) -> str:
        """Queue a chunk; return its request's id."""
        self._count += 1
        self._picture.putpixel((0, 0), (self._count % 256, self._count // 256 % 256, self._count // 65536))
        assert len(FRAME_TEXT.replace(IMAGE, "")) + 2 == CHUNK_TOKENS
        data = {"prompt": FRAME_TEXT, "multi_modal_data": {"image": self._picture.copy()}}
        prompt = render(self._bench.engine, data)
        name = f"session-{self._count}"
        self._bench.engine.add_request(name, prompt, self._params)
        return name


def measure(bench: BenchEngine, sessions: Sessions, counted: CountedSteps, number: int) -> None:
    """Have so many sessions decode, and chunks arrive beside them; print what was launched."""
    counted.steps.clear()
    with triton_compilations() as compiled:
        names = [sessions.add() for _ in range(number)]
        for _ in range(number + DECODE_STEPS):
            bench.engine.step()
        for chunks in (count for count in CHUNKS if count < number or number == 1):
            for _ in range(WAVES):
                # A session's next chunk takes the place of the one that has ended.
                bench.engine.abort_request(names[:chunks])
                names = names[chunks:] + [sessions.add() for _ in range(chunks)]
                for _ in range(chunks + 2):
                    bench.engine.step()
    print(json.dumps({"sessions": number, "compiled": compiled}), flush=True)
    for line in counted.lines():
        print(json.dumps(line), flush=True)
    bench.engine.abort_request(names)
    bench.finish(1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="preset")
    parser.add_argument("--mode", choices=MODES, default="graphs")
    parser.add_argument("--sessions", type=int, nargs="*", default=[1, 8, 32, 128])
    options = parser.parse_args()
    launches, start = Launches(), time.perf_counter()
    bench = BenchEngine(options.model, FULL, options.mode)
    about = {"model": options.model, "mode": options.mode, "start_s": round(time.perf_counter() - start, 1)}
    compilation = bench.vllm_config.compilation_config
    about |= {
        "graphs": str(compilation.cudagraph_mode),
        "kv_tokens": bench.vllm_config.cache_config.kv_cache_size_tokens,
    }
    print(json.dumps(about), flush=True)
    core = bench.engine.engine_core.engine_core
    return_awaited_tokens(core.scheduler)
    counted, sessions = CountedSteps(core, launches), Sessions(bench)
    for number in options.sessions:
        measure(bench, sessions, counted, number)
    leave()


if __name__ == "__main__":
    main()
