"""Time of the captioner's rules in a step: row by row in Python (the reference), and all rows at once in the plugin.

    benchmarks/caption_rules.py                  # processor time on one thread
    benchmarks/caption_rules.py --device cuda    # the host's time, and the device's, of a step on a GPU

Prints one JSON line for each number of sessions and of remembered tokens:

    reference_ms   every row by `caption_logits`, as the plugin did until 2026-11-27 (on a CPU)
    step_ms        vLLM's V1 processor with the tensors of `casa_vllm.caption_rules`: median of the steps
    host_ms        the host's part of a step on Model Runner V2, as on a GPU: all but the rules themselves (on a CPU)
    device_ms      the same step on the device, of a GPU
    chunk_ms       a session's next chunk: its state checked, turned into arrays and written to the table
"""

import argparse
import json
import statistics
import time
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate

from casa_engine.live.caption_logits import EXTRA_ARG, CaptionRules, CaptionState, caption_logits, to_dict
from casa_vllm.caption_processor import CaptionLogitsProcessor
from casa_vllm.caption_rules import table
from casa_vllm.caption_rules.remembered import RememberedRow
from casa_vllm.v2_caption_sampler import CaptionSampler

# The published captioner's, with a list of five stop tokens.
RULES = CaptionRules((151645, 151643, 48275, 58808, 62996), 1.15, 0.99, 5.0, 0.95, 4, 60)


def session_state(remembered: int, vocabulary: int, rng: np.random.Generator) -> CaptionState:
    """Return the state of a session that remembers so many tokens, none of them about to be forgotten."""
    ids = rng.permutation(vocabulary)[:remembered].tolist()
    counts = dict(zip(ids, rng.uniform(0.01, 4, remembered).tolist(), strict=True))
    return CaptionState(counts).read(rng.integers(0, vocabulary, RULES.ngram_window).tolist(), RULES)


def median_ms(work, count: int) -> float:
    """Return the median processor time of `count` calls, after two that are not counted."""
    times = []
    for _ in range(count + 2):
        start = time.process_time()
        work()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times[2:])


def reference_ms(states: list[CaptionState], logits: torch.Tensor, steps: int) -> float:
    """Return the time of a step of the reference; every session has just said a token."""
    kept = list(states)

    def step():
        for row, state in enumerate(kept):
            kept[row] = state.read([row], RULES).decay_counts(RULES)
            logits[row] = caption_logits(logits[row], kept[row], RULES)

    return median_ms(step, steps)


def host_ms(states: list[CaptionState], steps: int) -> float:
    """Return the time of a step of V2's sampler, in which nothing stands for the two kernels."""
    count = len(states)
    zeros = torch.zeros(count, dtype=torch.int32)
    requests = SimpleNamespace(max_num_reqs=count, device=zeros.device, prefill_len=SimpleNamespace(gpu=zeros))
    with patch.object(table, "numpy_apply_rules", lambda *arguments: None):
        sampler = CaptionSampler(SimpleNamespace(req_states=requests))
        for row, state in enumerate(states):
            sampler._table.write(row, RememberedRow.of_chunk(state, RULES, ()))
        batch = SimpleNamespace(
            idx_mapping=torch.arange(count),
            idx_mapping_np=np.arange(count),
            seq_lens=zeros + 1,
            input_ids=zeros,
            logits_indices=torch.arange(count),
        )
        logits = torch.zeros(count, 8)
        return median_ms(lambda: sampler.apply_rules(logits, batch), steps)


def measure(sessions: int, remembered: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the times of one line."""
    device, rng = torch.device(options.device), np.random.default_rng(0)
    states = [session_state(remembered, options.vocabulary, rng) for _ in range(sessions)]
    logits = torch.randn(sessions, options.vocabulary)
    result = {
        "reference_ms": reference_ms(states, logits, options.reference_steps),
        "host_ms": host_ms(states, options.steps),
    }
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=sessions))
    processor = CaptionLogitsProcessor(config, device, False)
    outputs = [[] for _ in states]
    logits = logits.to(device)
    sent = [SamplingParams(extra_args={EXTRA_ARG: to_dict(state, RULES)}) for state in states]

    def chunks():
        added = [(row, params, None, outputs[row]) for row, params in enumerate(sent)]
        processor.update_state(BatchUpdate(sessions, removed=[], added=added, moved=[]))
        processor.apply(logits)

    def step():
        for row, output in enumerate(outputs):
            output.append(row)
        processor.apply(logits)

    all_chunks = median_ms(chunks, 3)
    result["step_ms"] = median_ms(step, options.steps)
    result["chunk_ms"] = max(0.0, all_chunks - result["step_ms"]) / sessions
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(options.steps):
            step()
        end.record()
        end.synchronize()
        result["device_ms"] = start.elapsed_time(end) / options.steps
    return result


def main() -> None:
    """Parse the command line and print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--remembered", type=int, nargs="+", default=[100, 573, 1077])
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--reference-steps", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for sessions in options.sessions:
        for remembered in options.remembered:
            times = {name: round(value, 3) for name, value in measure(sessions, remembered, options).items()}
            print(json.dumps({"sessions": sessions, "remembered": remembered, **times}), flush=True)


if __name__ == "__main__":
    main()
