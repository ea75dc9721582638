"""Where a step's time goes on the device: the kernels that take most of it, by torch's profiler; on a CPU operations.

Without the processor's side of the profile, which would take longer than a step. Kernels of a graph have their names.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from bench_engine import BenchEngine
from rows import Rows
from sizes import Sizes
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STEPS, FRAMES, MOST = 20, 3, 12
# Longer than it takes until all sequences of the largest batch decode, and the steps that are profiled.
NUM_TOKENS, WARM_TOKENS, NAME_LENGTH = 128, 4, 70


def add_kernel_times(rows: Rows, case: str, number: int, function: Callable[[], Any]) -> None:
    """Profile a function that does something so many times; add the milliseconds of one time, kernel by kernel."""
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        function()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    times = []
    for event in profiled.key_averages():
        if on_gpu and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            times.append((event.self_device_time_total, event.count, event.key))
        elif not on_gpu:
            times.append((event.self_cpu_time_total, event.count, event.key))
    rows.add("profiled, all of it", case, seconds * 1e3 / number)
    rows.add("profiled, all kernels", case, sum(microseconds for microseconds, _, _ in times) / 1e3 / number)
    for microseconds, count, name in sorted(times, reverse=True)[:MOST]:
        shown = f"{case}: {name[:NAME_LENGTH].replace('|', '/')} ({count / number:g} times)"
        rows.add("profiled, kernel", shown, microseconds / 1e3 / number)


def measure_kernels(bench: BenchEngine, sizes: Sizes, rows: Rows, name: str) -> None:
    """Profile decode steps of one and of most sequences with a frame each, and first tokens of frames."""
    side = sizes.sides[-1]

    def decode() -> None:
        for _ in range(STEPS):
            bench.engine.step()

    for num_seqs in (sizes.num_seqs[0], sizes.num_seqs[-1]):
        for prompt in [bench.prompt(side) for _ in range(num_seqs)]:
            bench.add(prompt, NUM_TOKENS)
        lengths: dict[str, int] = {}
        while len(lengths) < num_seqs or min(lengths.values()) < WARM_TOKENS:
            lengths |= {output.request_id: len(output.outputs[0].token_ids) for output in bench.engine.step()}
        add_kernel_times(rows, f"{name}, decode step of {num_seqs} sequences", STEPS, decode)
        bench.finish()
    prompts = [bench.prompt(side) for _ in range(FRAMES)]

    def first_tokens() -> None:
        for prompt in prompts:
            bench.add(prompt, 1)
            bench.finish()

    add_kernel_times(rows, f"{name}, first token of a {side} px frame", FRAMES, first_tokens)
