"""Host's processor time of a decode step in vLLM, and where it goes: on a GPU, or under stand-ins of CUDA's libraries.

    python benchmarks/gpu/host_step.py CASA-Helium1-VL-2B [--seqs 1 128] [--llama] [--profile FILE]

The engine runs in this process with full decode graphs, asynchronous scheduling and random weights; each sequence has
an image of 448 px. Prints a JSON line for each number of sequences: the step's processor time (median and the tenth of
the fastest, ms), and that of the call that prepares its attention metadata. `--llama` measures vLLM's own model of the
same text configuration instead. Under stand-ins, whose kernels do nothing, it is the whole of a step's time.
"""

import argparse
import cProfile
import json
import os
import pstats
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy as np
from PIL import Image

from casa_engine.checkpoints import default_processor
from casa_engine.presets import preset_config

MAX_NUM_SEQS, MAX_PREFILL_STEPS, SIDE = 128, 2000, 448


def start(options: argparse.Namespace) -> Any:
    """Return vLLM's engine."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor

    folder = Path(tempfile.mkdtemp(prefix="host-step-"))
    config = preset_config(options.preset, architectures=["CasaForConditionalGeneration"])
    processor = default_processor(config)
    settings: dict[str, Any] = {"limit_mm_per_prompt": {"image": 1}, "mm_processor_cache_gb": 0}
    if options.llama:
        config, processor, settings = config.text_config, processor.tokenizer, {}
        config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    engine_config = EngineArgs(
        model=str(folder),
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=8192,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        **settings,
    ).create_engine_config()
    return LLMEngine(
        vllm_config=engine_config, executor_class=Executor.get_class(engine_config), log_stats=False
    )  # fmt: skip


def add_requests(engine: Any, num_seqs: int, options: argparse.Namespace) -> list[str]:
    """Queue requests that outlast the measurement; return their ids once all of them decode."""
    from vllm import SamplingParams
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    image = {} if options.llama else {"multi_modal_data": {"image": Image.fromarray(pixels)}}
    marker = "" if options.llama else "<|vision_start|><|image_pad|><|vision_end|>"
    params = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True, detokenize=False)
    names = [f"{num_seqs}-{index}" for index in range(num_seqs)]
    for name in names:
        parsed = parse_model_prompt(engine.model_config, {"prompt": f"{name}: {marker}describe this.", **image})
        prompt = engine.renderer.render_cmpl([parsed], engine.renderer.default_cmpl_tok_params)[0]
        engine.add_request(name, prompt, params)
    requests = engine.engine_core.engine_core.scheduler.requests
    for _ in range(MAX_PREFILL_STEPS):
        engine.step()
        # Not by the tokens that have come: under stand-ins even their number may be anything.
        if all(request.num_computed_tokens > request.num_prompt_tokens + 2 for request in requests.values()):
            return names
    raise RuntimeError(f"{num_seqs} sequences do not all decode after {MAX_PREFILL_STEPS} steps.")


def measure(engine: Any, num_steps: int) -> dict[str, float]:
    """Return milliseconds of processor time, of a step and of its attention metadata."""
    state = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model_state
    prepare, steps, metadata = state.prepare_attn, [], []

    def timed_prepare(*args: Any, **kwargs: Any) -> Any:
        begin = time.thread_time()
        result = prepare(*args, **kwargs)
        metadata.append(time.thread_time() - begin)
        return result

    state.prepare_attn = timed_prepare
    try:
        for _ in range(num_steps):
            begin = time.process_time()
            engine.step()
            steps.append(time.process_time() - begin)
    finally:
        del state.prepare_attn
    figures = {}
    for name, seconds in (("step", steps), ("metadata", metadata)):
        figures[f"{name}_ms"] = round(1e3 * statistics.median(seconds), 3)
        figures[f"{name}_fastest_ms"] = round(1e3 * sorted(seconds)[len(seconds) // 10], 3)
    return figures


def write_profile(engine: Any, num_steps: int, file: Path) -> None:
    """Write which functions the steps' time goes to."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(num_steps):
        engine.step()
    profile.disable()
    with file.open("w") as stream:
        stats = pstats.Stats(profile, stream=stream)
        for key in ("cumulative", "tottime"):
            stats.sort_stats(key).print_stats(70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--seqs", type=int, nargs="+", default=[1, MAX_NUM_SEQS])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--llama", action="store_true", help="vLLM's own model, text alone")
    parser.add_argument("--profile", type=Path, help="where to write profiles, a file a number of sequences")
    options = parser.parse_args()
    engine = start(options)
    scheduler = engine.vllm_config.scheduler_config
    for num_seqs in options.seqs:
        names = add_requests(engine, num_seqs, options)
        figures = {"preset": options.preset, "llama": options.llama, "async": scheduler.async_scheduling}
        print(json.dumps({**figures, "seqs": num_seqs, **measure(engine, options.steps)}), flush=True)
        if options.profile is not None:
            write_profile(engine, options.steps, options.profile.with_suffix(f".{num_seqs}.txt"))
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
    os._exit(0)  # under stand-ins nothing is to be waited for


if __name__ == "__main__":
    main()
