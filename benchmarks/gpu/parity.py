"""vLLM's tokens and logprobs against the eager model's on this device: `python parity.py RESULTS [MODEL ...] [--tiny]`.

Prompts and models of tests/vllm/test_parity.py, all prompts in one batch. That suite compiles an engine for each of its
models, too long for minutes on a machine; here CUDA graphs are on, those of the vision encoder too, and inductor is
off. The oracle is the eager model on the CPU in float32. float32: the same greedy tokens, logprobs within 1e-3. bf16:
the engine's own tokens, whose logprobs the eager model gives when it is made to say them.
"""

import argparse
import os
import tempfile
import time
import traceback
from contextlib import closing
from pathlib import Path
from typing import Any

# Self-attention in float32 multiplies with TF32 otherwise; read when Triton is imported.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

import torch
from rows import Rows, leave
from test_parity import MODELS, NUM_TOKENS, PROMPTS

from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.presets import preset_config
from vllm_harness import Answer, Eager, Engine, Prompt

FIRST = ("llama-ca", "qwen-ca_tv-grid")
# Of decode, and of the whole batch's prefill.
GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL",
    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 64, 256, 512],
    "cudagraph_mm_encoder": True,
}
# A share of the memory, so that what one engine has not given back does not stop the next.
MEMORY = {"gpu_memory_utilization": 0.3, "num_gpu_blocks_override": 4000}
BOUNDS = {"float32": 1e-3, "bfloat16": 5e-2}


@torch.inference_mode()
def forced_logprobs(eager: Eager, prompt: Prompt, tokens: list[int]) -> list[float]:
    """Return the eager model's logprobs of tokens that somebody else has chosen."""
    batch = dict(eager.processor(images=list(prompt.images) or None, text=prompt.text))
    cache, logprobs = eager.model.new_cache(), []
    for token in tokens:
        output = eager.model(**batch, past_key_values=cache, logits_to_keep=1)
        logprobs.append(float(output.logits[0, -1].float().log_softmax(-1)[token]))
        batch = {"input_ids": torch.tensor([[token]])}
    return logprobs


def greatest_difference(eager: Eager, answers: list[Answer], dtype: str) -> float:
    """Return the greatest difference of logprobs; in float32 infinity where a greedy token differs."""
    greatest = 0.0
    for prompt, answer in zip(PROMPTS.values(), answers, strict=True):
        if dtype == "float32" and answer.tokens != eager(prompt, NUM_TOKENS).tokens:
            return float("inf")
        expected = forced_logprobs(eager, prompt, answer.tokens)
        difference = torch.tensor(answer.logprobs) - torch.tensor(expected)
        greatest = max(greatest, float(difference.abs().nan_to_num(nan=float("inf")).max()))
    return greatest


def difference_of(folder: Path, eager: Eager, dtype: str, options: dict[str, Any]) -> float:
    """Return an engine's greatest difference; NaN where it does not start or does not answer."""
    try:
        with closing(Engine(folder, dtype=dtype, **MEMORY, **options)) as engine:
            return greatest_difference(eager, engine.ask(list(PROMPTS.values()), NUM_TOKENS), dtype)
    except Exception:  # noqa: BLE001 (whatever it is is printed and counts as a difference; the next model may do)
        traceback.print_exc()
        return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--tiny", action="store_true", help="without graphs, on a CPU")
    options = parser.parse_args()
    rows, wrong = Rows(options.results), []
    names = options.models or [*FIRST, *(name for name in MODELS if name not in FIRST)]
    engine_options: dict[str, Any] = {"is_async": True, "enforce_eager": False, "compilation_config": GRAPHS}
    if options.tiny:
        engine_options = {"enforce_eager": True}
    for name in names[:1] if options.tiny else names:
        preset, fields = MODELS[name]
        folder = Path(tempfile.mkdtemp(prefix="casa-parity-"))
        write_random_checkpoint(preset_config(preset, **fields), folder)
        eager = Eager(folder)
        # The first models in both types; what the others add is their shape.
        for dtype in ("float32", "bfloat16") if name in FIRST else ("bfloat16",):
            start = time.perf_counter()
            difference = difference_of(folder, eager, dtype, engine_options)
            seconds = f"{time.perf_counter() - start:.0f} s"
            if not rows.check("logprobs differ from the eager model's", f"{name}, {dtype}", difference, BOUNDS[dtype]):
                wrong.append(f"{name} {dtype}")
            print(f"   {seconds}", flush=True)
    if wrong:
        raise SystemExit(f"differ: {', '.join(wrong)}")
    leave()


if __name__ == "__main__":
    main()
