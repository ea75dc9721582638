"""Host time of a decode step's CA metadata, on both model runners, and what is sent to the device for it; needs no GPU.

    PYTHONPATH=tests/support python benchmarks/step_preparation.py [--seqs 1 32 128] [--fusion ca ca_tv]

An engine decodes that many sequences, each with an image. Timed is what CA adds to the call that builds a step's
attention metadata: the call less the same call of vLLM's own class within it; the median of the steps, processor time.
On Model Runner V2 (GPUs) the step is prepared as a decode graph is replayed, CA's Triton kernels are not run (on a
device only their launch costs the host), and counted are the operations that would be kernels and the copies from the
host.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

IS_V2 = "--runner" in sys.argv and sys.argv[sys.argv.index("--runner") + 1] == "v2"
if IS_V2:
    import interpreted_triton  # noqa: F401  before vLLM and Triton are imported

from casa_engine.checkpoints import write_random_checkpoint  # noqa: E402
from casa_engine.presets import preset_config  # noqa: E402
from vllm_harness import IMAGE, Engine, Prompt, picture  # noqa: E402

WARM_UP_STEPS = 5


class Clock:
    """Seconds of a method and, within them, of its base class's, a pair for each call."""

    def __init__(self, cls: type, base: type, name: str) -> None:
        self.seconds: list[tuple[float, float]] = []
        self._base_seconds = 0.0
        self._patches = [
            patch.object(cls, name, self._timed(getattr(cls, name), is_base=False)),
            patch.object(base, name, self._timed(getattr(base, name), is_base=True)),
        ]

    def __enter__(self) -> "Clock":
        for entry in self._patches:
            entry.start()
        return self

    def __exit__(self, *error: Any) -> None:
        for entry in self._patches:
            entry.stop()

    def _timed(self, method: Any, *, is_base: bool) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            result = method(*args, **kwargs)
            elapsed = time.thread_time() - start
            if is_base:
                self._base_seconds = elapsed
            else:
                self.seconds.append((elapsed, self._base_seconds))
            return result

        return call

    def added_us(self) -> float:
        """Returns the median of what the method adds to its base class's, in microseconds."""
        return 1e6 * statistics.median(whole - base for whole, base in self.seconds)


def clock() -> Clock:
    """Returns the clock of this process's model runner."""
    if IS_V2:
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        from casa_vllm.v2_model_state import CasaModelState

        return Clock(CasaModelState, DefaultModelState, "prepare_attn")
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from casa_vllm.v1_runner import CasaCPUModelRunner

    return Clock(CasaCPUModelRunner, GPUModelRunner, "_build_attention_metadata")


def prepare_for_a_graph() -> Any:
    """Prepares decode steps on V2 as those that a full CUDA graph replays."""
    from vllm.config.compilation import CUDAGraphMode

    from casa_vllm.v2_model_state import CasaModelState

    prepare = CasaModelState.prepare_attn

    def prepare_attn(state: Any, input_batch: Any, mode: Any, *args: Any, **kwargs: Any) -> Any:
        is_decode = input_batch.num_tokens == input_batch.num_reqs
        return prepare(state, input_batch, CUDAGraphMode.FULL if is_decode else mode, *args, **kwargs)

    return patch.object(CasaModelState, "prepare_attn", prepare_attn)


def only_vllm_kernels() -> Any:
    """Runs the kernels of vLLM's runner, without which no step works, and no others: their results do not matter."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def run(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        if executor.fn.__module__.startswith("vllm.v1.worker.gpu."):
            launch(executor, *args, **kwargs)

    return patch.object(GridExecutor, "__call__", run)


def count_launches(engine: Engine) -> dict[str, int]:
    """Counts what CA adds to the preparation of one step on V2: `kernels` and `copies` from the host."""
    from kernel_counts import LaunchCounter
    from vllm.utils import torch_utils

    from casa_vllm.v2_model_state import CasaModelState

    counts: Counter[str] = Counter()
    copy = torch_utils.async_tensor_h2d

    def counted_copy(*args: Any, **kwargs: Any) -> Any:
        counts["copies"] += 1
        return copy(*args, **kwargs)

    def counted(cls: type, sign: int) -> Any:
        method = cls.prepare_attn

        def call(*args: Any, **kwargs: Any) -> Any:
            counter = LaunchCounter()
            with counter.counting() as launches:
                result = method(*args, **kwargs)
            counts["kernels"] += sign * sum(launches.values())
            return result

        return patch.object(cls, "prepare_attn", call)

    users = [module for module in list(sys.modules.values()) if getattr(module, "async_tensor_h2d", None) is copy]
    patches = [patch.object(module, "async_tensor_h2d", counted_copy) for module in users]
    for entry in patches:
        entry.start()
    with counted(CasaModelState, 1):
        engine.engine.step()
    for entry in patches:
        entry.stop()
    return dict(counts)


def measure(fusion: str, num_seqs: int, num_steps: int) -> dict[str, Any]:
    """Returns the figures of one engine that decodes `num_seqs` sequences."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(preset_config("tiny-llama", fusion=fusion), Path(folder))
        engine = Engine(Path(folder), max_num_seqs=num_seqs, num_gpu_blocks_override=4 * num_seqs + 600)
        for index in range(num_seqs):
            engine.add(Prompt(f"Sequence {index} {IMAGE} and its text", (picture(index % 8),)), num_steps + 200)
        scheduler = engine.scheduler
        while any(request.is_prefill_chunk or not request.num_output_tokens for request in scheduler.requests.values()):
            engine.engine.step()
        for _ in range(WARM_UP_STEPS):
            engine.engine.step()
        with clock() as timed:
            for _ in range(num_steps):
                engine.engine.step()
        figures: dict[str, Any] = {"host_us": round(timed.added_us(), 1)}
        if IS_V2:
            figures |= count_launches(engine)
        engine.close()
    return figures


def measure_all(options: argparse.Namespace) -> None:
    """Prints a JSON line for each fusion and number of sequences on this process's runner."""
    for fusion in options.fusion:
        for num_seqs in options.seqs:
            figures = measure(fusion, num_seqs, options.steps)
            print(json.dumps({"runner": options.runner, "fusion": fusion, "seqs": num_seqs, **figures}), flush=True)


def run_of(runner: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the figures of one runner, from a process of its own."""
    command = [sys.executable, __file__, "--runner", runner, "--steps", str(options.steps)]
    command += ["--seqs", *map(str, options.seqs), "--fusion", *options.fusion]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"runner"')]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqs", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--fusion", nargs="+", default=["ca", "ca_tv"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runner", choices=["v1", "v2"], help="one runner, one JSON line a measurement")
    options = parser.parse_args()
    if options.runner is not None:
        if IS_V2:
            with only_vllm_kernels(), prepare_for_a_graph():
                measure_all(options)
        else:
            measure_all(options)
        return
    print("| runner | fusion | sequences | host, us a step | kernels | copies |")
    print("|---|---|---:|---:|---:|---:|")
    for runner in ("v1", "v2"):
        for row in run_of(runner, options):
            cells = [str(row.get(key, 0)) if runner == "v2" else "-" for key in ("kernels", "copies")]
            host = row["host_us"]
            print(f"| {runner.upper()} | {row['fusion']} | {row['seqs']} | {host:.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
