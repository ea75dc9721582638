"""Decode steps of CASA in vLLM against vLLM's own Llama; what images cost is measured by `casa bench stream`.

    python benchmarks/decode_step.py [--seqs 1 8] [--rounds 7] [--dtype float32]

Decode: text only, random weights, models of the same decoder size (`--layers`, `--hidden`). All
engines live in this process and take turns, some steps each, so that a slow minute of the machine
hits all of them; the figure is the median step. `ca` has nothing to do without an image. `ca_tv`
attends to the window's text: its own attention and, with its own weights, projections that Llama
has not; what that costs at least is the last column (weights read, relative to Llama).
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
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from transformers import LlamaConfig

from casa_engine.checkpoints import default_processor
from casa_engine.configuration import CasaConfig
from casa_engine.presets import TINY_IDS, TINY_VISION

PROMPT_TOKENS = 64
STEPS_PER_TURN = 12
CASA_MODELS = {
    "casa ca": {"fusion": "ca"},
    "casa ca, shared weights": {"fusion": "ca", "ca_weights": "shared"},
    "casa ca_tv": {"fusion": "ca_tv"},
    "casa ca_tv, shared weights": {"fusion": "ca_tv", "ca_weights": "shared"},
}


def text_config(options: argparse.Namespace) -> LlamaConfig:
    """The decoder that all models have in common; 64 a head, four query heads to a kv head."""
    heads = options.hidden // 64
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=4096,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


def casa_config(options: argparse.Namespace, **fields: Any) -> CasaConfig:
    """The same decoder with a small vision encoder."""
    vision = dict(TINY_VISION, out_hidden_size=options.hidden)
    return CasaConfig(
        text_config=text_config(options),
        vision_config=vision,
        architectures=["CasaForConditionalGeneration"],
        **(TINY_IDS | fields),
    )


class Engine:
    """vLLM in this process, on a folder without weights (they are random).

    Args:
        config: Model configuration; a processor is written beside it for CASA.
        options: Command line.
        **settings: Engine arguments.
    """

    def __init__(self, config: Any, options: argparse.Namespace, **settings: Any) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor.abstract import Executor

        folder = Path(tempfile.mkdtemp(prefix="decode-step-"))
        config.save_pretrained(folder)
        if isinstance(config, CasaConfig):
            default_processor(config).save_pretrained(folder)
        else:
            settings["skip_tokenizer_init"] = True
        engine_config = EngineArgs(
            model=str(folder),
            load_format="dummy",
            dtype=options.dtype,
            enforce_eager=not options.compile,
            max_model_len=2048,
            max_num_seqs=max(options.seqs),
            max_num_batched_tokens=1024,
            enable_prefix_caching=False,
            **settings,
        ).create_engine_config()
        self.engine = LLMEngine(
            vllm_config=engine_config,
            executor_class=Executor.get_class(engine_config),
            log_stats=False,
        )
        self._num_requests = 0

    def add(self, prompt: dict[str, Any], max_tokens: int) -> None:
        """Queue a request that runs to `max_tokens`."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self._num_requests += 1
        self.engine.add_request(f"r{self._num_requests}", prompt, params)

    def finish(self) -> None:
        """Abort what is left."""
        self.engine.abort_request([f"r{i + 1}" for i in range(self._num_requests)])
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def timed_steps(self, count: int) -> list[float]:
        """Milliseconds of each of the next steps."""
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self.engine.step()
            times.append((time.perf_counter() - start) * 1e3)
        return times


def measure_decode(engines: dict[str, Engine], num_seqs: int, rounds: int) -> dict[str, float]:
    """Median decode step of each engine in milliseconds; the engines take turns."""
    rng = np.random.default_rng(0)
    max_tokens = STEPS_PER_TURN * (rounds + 1) + 50
    for engine in engines.values():
        for _ in range(num_seqs):
            ids = rng.integers(5, 250, PROMPT_TOKENS).tolist()
            engine.add({"prompt_token_ids": ids}, max_tokens)
        engine.timed_steps(STEPS_PER_TURN)  # prefill, first steps
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            times[name] += engine.timed_steps(STEPS_PER_TURN)
    for engine in engines.values():
        engine.finish()
    return {name: statistics.median(values) for name, values in times.items()}


def decoder_weights(config: Any) -> int:
    """Values a text-only decode step reads."""
    casa = config if isinstance(config, CasaConfig) else None
    text = casa.text_config if casa else config
    head_dim = text.hidden_size // text.num_attention_heads
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads
    attention = text.hidden_size * heads * head_dim
    mlp = 3 * text.hidden_size * text.intermediate_size
    reads_own = casa is not None and casa.sees_window_text and casa.ca_weights == "own"
    layer = attention * (2 if reads_own else 1) + mlp
    return text.num_hidden_layers * layer + text.hidden_size * text.vocab_size


def report_decode(options: argparse.Namespace) -> None:
    """Print the table of decode steps."""
    configs: dict[str, Any] = {"llama": text_config(options)}
    configs |= {name: casa_config(options, **fields) for name, fields in CASA_MODELS.items()}
    engines = {name: Engine(config, options) for name, config in configs.items()}
    size = f"{options.layers} layers of {options.hidden}"
    print(f"\n| text-only decode, {size} | sequences | step, ms | vLLM's Llama, ms | ratio | weights read |")
    print("|---|---|---|---|---|---|")
    for num_seqs in options.seqs:
        medians = measure_decode(engines, num_seqs, options.rounds)
        for name in CASA_MODELS:
            weights = decoder_weights(configs[name]) / decoder_weights(configs["llama"])
            cells = f"{medians[name]:.2f} | {medians['llama']:.2f} | {medians[name] / medians['llama']:.2f}x"
            print(f"| {name} | {num_seqs} | {cells} | {weights:.2f}x |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqs", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--compile", action="store_true", help="vLLM's defaults, not eager mode")
    report_decode(parser.parse_args())


if __name__ == "__main__":
    main()
