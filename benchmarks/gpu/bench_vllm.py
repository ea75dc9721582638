"""CASA in vLLM at a preset's size, random weights: decode tokens/s and first tokens.

`python bench_vllm.py RESULTS PRESET [--tiny]`: one preset a process, so that each starts with an
empty device. `--tiny` tries the code on a CPU: its times mean nothing.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import numpy as np
from bench_standalone import FULL, PREFILL_TOKENS, TINY, num_image_tokens
from floors import H200, decode_work, first_token_floor_ms
from PIL import Image
from timing import record

from casa_engine.checkpoints import default_processor
from casa_engine.presets import preset_config

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# The byte tokenizer gives one token a character; two more are the image's delimiters.
QUESTION = "describe this."
DECODE_TOKENS = 128
FIRST_TOKEN_FRAMES = 7


class Bench:
    """An engine of the preset and its measurements.

    Args:
        preset: Name of the preset.
        tiny: Whether to run a tiny preset on the CPU.
        results: The results file.
    """

    def __init__(self, preset: str, tiny: bool, results: Path) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor.abstract import Executor

        self.preset, self.results = preset, results
        self.sizes = TINY if tiny else FULL
        self.config = preset_config(preset, architectures=["CasaForConditionalGeneration"])
        folder = tempfile.mkdtemp(prefix="bench-vllm-")
        self.config.save_pretrained(folder)
        default_processor(self.config).save_pretrained(folder)
        arguments = EngineArgs(
            model=folder,
            load_format="dummy",
            dtype="float32" if tiny else "bfloat16",
            enforce_eager=tiny,
            max_model_len=2048,
            max_num_seqs=max(self.sizes.num_seqs),
            max_num_batched_tokens=8192 if not tiny else 512,
            limit_mm_per_prompt={"image": 1},
            # Every frame is new in a live stream: nothing is to be found again.
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
        )
        engine_config = arguments.create_engine_config()
        self.engine = LLMEngine(
            vllm_config=engine_config,
            executor_class=Executor.get_class(engine_config),
            log_stats=False,
        )
        self._rng = np.random.default_rng(0)
        self._count = 0

    def render(self, side: int) -> Any:
        """A prompt with a new random frame, preprocessed."""
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        pixels = self._rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        data = {"prompt": IMAGE + QUESTION, "multi_modal_data": {"image": Image.fromarray(pixels)}}
        renderer = self.engine.renderer
        parsed = parse_model_prompt(self.engine.model_config, data)
        return renderer.render_cmpl([parsed], renderer.default_cmpl_tok_params)[0]

    def add(self, prompt: Any, max_tokens: int) -> None:
        """Queues a request."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self._count += 1
        self.engine.add_request(f"r{self._count}", prompt, params)

    def decode(self, num_seqs: int, *, is_warmup: bool = False) -> None:
        """Sequences with an image each; timed once all of them decode."""
        side = self.sizes.sides[-1]
        for prompt in [self.render(side) for _ in range(num_seqs)]:
            self.add(prompt, DECODE_TOKENS)
        lengths: dict[str, int] = {}
        start = tokens_before = 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                lengths[output.request_id] = len(output.outputs[0].token_ids)
            if not start and len(lengths) == num_seqs and min(lengths.values()) >= 4:
                start, tokens_before = time.perf_counter(), sum(lengths.values())
            if start and max(lengths.values()) >= DECODE_TOKENS:
                break  # the first to end leaves a smaller batch behind
        seconds = time.perf_counter() - start
        step_ms = seconds / (sum(lengths.values()) - tokens_before) * num_seqs * 1e3
        while self.engine.has_unfinished_requests():
            self.engine.step()
        if is_warmup:
            return
        image_tokens = num_image_tokens(self.config, side)
        work = decode_work(self.config, num_seqs, image_tokens, PREFILL_TOKENS + DECODE_TOKENS // 2)
        case = f"{self.preset}, {num_seqs} sequences, {side} px image each"
        record(self.results, "decode step (vLLM)", case, step_ms, work.floor_ms(H200))

    def first_token(self, side: int) -> None:
        """From a preprocessed frame to its first token; preprocessing beside it."""
        prepared, answered = [], []
        for _ in range(FIRST_TOKEN_FRAMES):
            start = time.perf_counter()
            prompt = self.render(side)
            prepared.append((time.perf_counter() - start) * 1e3)
            start = time.perf_counter()
            self.add(prompt, 1)
            while self.engine.has_unfinished_requests():
                self.engine.step()
            answered.append((time.perf_counter() - start) * 1e3)
        case = f"{self.preset}, {side} px"
        floor = first_token_floor_ms(self.config, side, PREFILL_TOKENS, H200)
        record(self.results, "first token (vLLM)", case, statistics.median(answered), floor)
        record(self.results, "preprocessing on the CPU", case, statistics.median(prepared), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("preset")
    parser.add_argument("--tiny", action="store_true", help="a tiny preset on the CPU")
    options = parser.parse_args()
    bench = Bench(options.preset, options.tiny, options.results)
    bench.decode(1, is_warmup=True)  # compiles what is compiled on first use
    for side in bench.sizes.sides:
        bench.first_token(side)
    for num_seqs in bench.sizes.num_seqs:
        bench.decode(num_seqs)


if __name__ == "__main__":
    main()
