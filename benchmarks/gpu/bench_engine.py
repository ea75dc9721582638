"""vLLM in this process with a preset's sizes and random weights, and how measurements feed it.

A model is named by its preset, or by "plain:PRESET": vLLM's own model of the preset's text decoder (Llama, Qwen2),
beside which CASA stands.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sizes import PREFILL_TOKENS, Sizes

from casa_bench.engine_backend import render, sampling
from casa_engine.checkpoints import default_processor
from casa_engine.presets import preset_config

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# The byte tokenizer gives one token a character; two more are the image's delimiters.
QUESTION = "describe this."
PLAIN = "plain:"
PLAIN_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# From the mode with the fewest parts that can break.
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    # CUDA graphs of decode and no inductor: starts in seconds.
    "decode-graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    # Short prefills and the vision encoder as graphs, too, as `casa serve` has them.
    "graphs": {
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL",
            "cudagraph_mm_encoder": True,
            # Of what is measured; vLLM's own sizes take longer to capture than a start may.
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256],
        }
    },
    "compile": {"compilation_config": {"cudagraph_mm_encoder": True}},
}


class BenchEngine:
    """An engine and its requests.

    Args:
        model: Preset, or "plain:PRESET".
        sizes: What will be asked.
        mode: One of MODES.
        **options: Engine arguments that override the rest.

    Attributes:
        config: The preset's configuration.
        engine: vLLM's `LLMEngine`.
    """

    def __init__(self, model: str, sizes: Sizes, mode: str = "graphs", **options: Any) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor.abstract import Executor

        on_gpu = sizes.device.type == "cuda"
        self.is_plain = model.startswith(PLAIN)
        self.config = preset_config(model.removeprefix(PLAIN), architectures=["CasaForConditionalGeneration"])
        arguments: dict[str, Any] = {
            "model": str(write_checkpoint(self.config, is_plain=self.is_plain)),
            "load_format": "dummy",
            "dtype": str(sizes.dtype).removeprefix("torch."),
            "max_model_len": 2048 if on_gpu else 256,
            "max_num_seqs": max(sizes.num_seqs),
            "max_num_batched_tokens": 8192 if on_gpu else 512,
            # Every frame is new in a live stream: nothing is to be found again.
            "enable_prefix_caching": False,
            **MODES[mode if on_gpu else "eager"],
        }
        if self.is_plain:
            arguments["skip_tokenizer_init"] = True
            # There is no vision encoder, and vLLM's own graphs of mode FULL would decode as if they prefilled.
            if "graphs" in mode and on_gpu:
                arguments |= MODES["decode-graphs"]
            elif mode == "compile":
                arguments.pop("compilation_config", None)
        else:
            arguments |= {"limit_mm_per_prompt": {"image": 1}, "mm_processor_cache_gb": 0}
        vllm_config = EngineArgs(**(arguments | options)).create_engine_config()
        executor = Executor.get_class(vllm_config)
        self.engine = LLMEngine(vllm_config=vllm_config, executor_class=executor, log_stats=False)
        self.vllm_config = vllm_config
        self._rng = np.random.default_rng(0)
        self._count = 0

    def frame(self, side: int) -> Image.Image:
        """Return another random picture."""
        return Image.fromarray(self._rng.integers(0, 255, (side, side, 3), dtype=np.uint8))

    def prompt(self, side: int) -> Any:
        """Return a rendered prompt with a new random frame; for a plain model random text as long as the CASA text."""
        if self.is_plain:
            return {"prompt_token_ids": self._rng.integers(5, 250, PREFILL_TOKENS).tolist()}
        data = {"prompt": IMAGE + QUESTION, "multi_modal_data": {"image": self.frame(side)}}
        return render(self.engine, data)

    def add(self, prompt: Any, max_tokens: int) -> str:
        """Queue a request of exactly so many tokens; return its id."""
        from vllm.sampling_params import RequestOutputKind

        self._count += 1
        name = f"r{self._count}"
        self.engine.add_request(name, prompt, sampling(max_tokens, RequestOutputKind.CUMULATIVE))
        return name

    def finish(self, max_steps: int = 100_000) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.engine.has_unfinished_requests():
                return
            self.engine.step()
        raise RuntimeError(f"{max_steps} steps, and a request has not ended.")


def write_checkpoint(config: Any, *, is_plain: bool) -> Path:
    """Write a model's folder without weights, which vLLM makes up."""
    folder = Path(tempfile.mkdtemp(prefix="casa-gpu-"))
    if not is_plain:
        config.save_pretrained(folder)
        default_processor(config).save_pretrained(folder)
        return folder
    text = config.text_config.to_dict()
    text["architectures"] = [PLAIN_ARCHITECTURES[text["model_type"]]]
    text["tie_word_embeddings"] = config.tie_word_embeddings
    (folder / "config.json").write_text(json.dumps(text))
    return folder


@contextmanager
def triton_compilations() -> Iterator[list[str]]:
    """Collect the names of the kernels that Triton compiles in a block; empty where there is no Triton."""
    names: list[str] = []
    try:
        from triton import knobs
    except ImportError:
        yield names
        return
    before = knobs.runtime.jit_post_compile_hook

    def note(**event: Any) -> Any:
        names.append(getattr(event.get("fn"), "name", "?").rpartition(".")[2])
        return None if before is None else before(**event)

    knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = before
