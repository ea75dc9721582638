"""Host time of a decode step's CA metadata, on both model runners, and what is sent to the device for it; needs no GPU.

    PYTHONPATH=tests/support python benchmarks/step_preparation.py [--seqs 1 32 128] [--fusion ca ca_tv]

An engine decodes that many sequences, each with an image. Timed is the call that builds a step's attention metadata,
vLLM's own part included: the median of the steps, processor time. On Model Runner V2 (GPUs) the step is prepared as a
decode graph is replayed; CA's Triton kernels are not run (on a device only their launch costs the host). Counted are
the operations that would be kernels, vLLM's own and those on the host's tensors included, and copies from the host.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
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
    """Processor seconds of each call of a method."""

    def __init__(self, cls: type, name: str) -> None:
        self.seconds: list[float] = []
        method = getattr(cls, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            result = method(*args, **kwargs)
            self.seconds.append(time.thread_time() - start)
            return result

        self._patch = patch.object(cls, name, call)

    def __enter__(self) -> "Clock":
        self._patch.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._patch.stop()

    def median_us(self) -> float:
        """Return the median in microseconds."""
        return 1e6 * statistics.median(self.seconds)


def clock() -> Clock:
    """Return the clock of this process's model runner."""
    if IS_V2:
        from casa_vllm.v2_model_state import CasaModelState

        return Clock(CasaModelState, "prepare_attn")
    from casa_vllm.v1_runner import CasaCPUModelRunner

    return Clock(CasaCPUModelRunner, "_build_attention_metadata")


def prepare_for_a_graph() -> Any:
    """Prepare decode steps on V2 as those that a full CUDA graph replays."""
    from vllm.config.compilation import CUDAGraphMode

    from casa_vllm.v2_model_state import CasaModelState

    prepare = CasaModelState.prepare_attn

    def prepare_attn(state: Any, input_batch: Any, mode: Any, *args: Any, **kwargs: Any) -> Any:
        is_decode = input_batch.num_tokens == input_batch.num_reqs
        return prepare(state, input_batch, CUDAGraphMode.FULL if is_decode else mode, *args, **kwargs)

    return patch.object(CasaModelState, "prepare_attn", prepare_attn)


def only_vllm_kernels() -> Any:
    """Run the kernels of vLLM's runner, without which no step works, and no others: their results do not matter."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def run(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        if executor.fn.__module__.startswith("vllm.v1.worker.gpu."):
            launch(executor, *args, **kwargs)

    return patch.object(GridExecutor, "__call__", run)


def count_launches(engine: Engine) -> dict[str, int]:
    """Count in the preparation of one step on V2: `kernels`, and `copies` from the host."""
    from kernel_counts import LaunchCounter
    from vllm.utils import torch_utils

    from casa_vllm.v2_model_state import CasaModelState

    counts: dict[str, int] = {}
    prepare, copy, copies = CasaModelState.prepare_attn, torch_utils.async_tensor_h2d, []

    def counted_copy(*args: Any, **kwargs: Any) -> Any:
        copies.append(None)
        return copy(*args, **kwargs)

    def counted_prepare(*args: Any, **kwargs: Any) -> Any:
        num_before = len(copies)
        with LaunchCounter().counting() as launches:
            result = prepare(*args, **kwargs)
        counts["kernels"], counts["copies"] = sum(launches.values()), len(copies) - num_before
        return result

    users = [module for module in list(sys.modules.values()) if getattr(module, "async_tensor_h2d", None) is copy]
    with ExitStack() as patches:
        for module in users:
            patches.enter_context(patch.object(module, "async_tensor_h2d", counted_copy))
        patches.enter_context(patch.object(CasaModelState, "prepare_attn", counted_prepare))
        engine.engine.step()
    return counts


def measure(fusion: str, num_seqs: int, num_steps: int) -> dict[str, Any]:
    """Return the figures of one engine that decodes `num_seqs` sequences."""
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
        figures: dict[str, Any] = {"host_us": round(timed.median_us(), 1)}
        if IS_V2:
            figures |= count_launches(engine)
        engine.close()
    return figures


def measure_all(options: argparse.Namespace) -> None:
    """Print a JSON line for each fusion and number of sequences on this process's runner."""
    for fusion in options.fusion:
        for num_seqs in options.seqs:
            figures = measure(fusion, num_seqs, options.steps)
            print(json.dumps({"runner": options.runner, "fusion": fusion, "seqs": num_seqs, **figures}), flush=True)


def run_of(runner: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the figures of one runner, from a process of its own."""
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
