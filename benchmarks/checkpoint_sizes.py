"""Convert, load and ask an original of a published model's size: seconds, peak memory, tokens a second.

    PYTHONPATH=tests/support python benchmarks/checkpoint_sizes.py CASA-Helium1-VL-2B --work DIR
    PYTHONPATH=tests/support python benchmarks/checkpoint_sizes.py CASA-Qwen2_5-VL-3B --work DIR

Weights are random bfloat16, under the names that the engine's tables call unverified, in three shards. Each stage is a
process of its own, so that its peak is its own; DIR needs room for the weights twice. Of the peak, "resident" counts
what is mapped from the checkpoint's files as well, which the system takes back when it needs room; "own" does not.
The stage "bare" starts the same engine on a model of a few hundred kB: libraries and KV cache, which the engine's peak
has in it beside the weights.
"""

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from casa_bench.backend import Needs
from casa_bench.engine_backend import EngineBackend, EngineSettings
from casa_bench.process_use import own_bytes, resident_peak_bytes
from casa_engine.checkpoint_cli import main as casa_checkpoint
from casa_engine.checkpoints import load_model, random_model, weight_bytes
from casa_engine.presets import preset_config
from originals import candidate_names, write_original

STAGES = ("write", "convert", "load", "load-converted", "bare", "engine")
GIB = 1 << 30
IMAGE_PX, NUM_TOKENS = 448, 64
BARE_PRESETS = {"helium": "tiny-llama", "qwen": "tiny-qwen"}
SAMPLE_S = 0.02


class Peak:
    """The most memory that is this process's own, sampled by a thread."""

    def __init__(self) -> None:
        self.own_bytes = own_bytes()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        """End the sampling."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.own_bytes = max(self.own_bytes, own_bytes())


@contextmanager
def measured(what: str, weights: int) -> Iterator[None]:
    """Print what a step took, its peak beside the size of the weights."""
    peak, begun_s = Peak(), time.perf_counter()
    yield
    seconds = time.perf_counter() - begun_s
    peak.stop()
    resident = resident_peak_bytes()
    print(
        f"{what}: {seconds:.1f} s, peak {resident / GIB:.2f} GiB resident, {peak.own_bytes / GIB:.2f} GiB own "
        f"= {peak.own_bytes / weights:.2f}x the weights ({weights / GIB:.2f} GiB); own afterwards "
        f"{own_bytes() / GIB:.2f} GiB",
        flush=True,
    )


def run_stage(stage: str, preset: str, work: Path) -> None:
    """Run one stage in this process; print its figures."""
    original, converted = work / "original", work / "converted"
    family = "helium" if "Helium" in preset else "qwen"
    if stage == "write":
        model = random_model(preset_config(preset), dtype=torch.bfloat16)
        write_original(model, family, original, candidate_names(family))
        print(f"write: {weight_bytes(model) / GIB:.2f} GiB of weights", flush=True)
        return
    weights = sum(path.stat().st_size for path in original.glob("*.safetensors"))
    if stage == "convert":
        with measured("convert", weights):
            status = casa_checkpoint(["convert", str(original), str(converted)])
        if status:
            raise SystemExit(status)
    elif stage == "bare":
        bare = work / "bare"
        if not bare.exists():
            small = random_model(preset_config(BARE_PRESETS[family]), dtype=torch.bfloat16)
            write_original(small, family, bare, candidate_names(family))
        with measured("engine without weights, start", weights):
            start_engine(bare).close()
    elif stage == "engine":
        ask_engine(original, weights)
    else:
        folder = original if stage == "load" else converted
        with measured(f"{stage} (eager model)", weights):
            model = load_model(folder, dtype=torch.bfloat16)
            # Mapped weights are read when they are used.
            sum(parameter.view(torch.int16).max().item() for parameter in model.parameters())


def start_engine(folder: Path) -> EngineBackend:
    """Load an original in place into vLLM, with 1 GiB of KV cache."""
    needs = Needs(images=1, image_px=IMAGE_PX, tokens_per_image=2 + NUM_TOKENS)
    return EngineBackend(folder, needs, EngineSettings(kv_cache_gib=1, enforce_eager=True))


def ask_engine(folder: Path, weights: int) -> None:
    """Load the original in place into vLLM and ask about an image, twice."""
    with measured("engine, start", weights):
        backend = start_engine(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGE_PX, IMAGE_PX, 3), np.uint8)
    content = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": "What is this?"}]
    for question in ("first", "second"):
        with measured(f"engine, {question} question", weights):
            (answer,) = backend.answer([[{"role": "user", "content": content}]], NUM_TOKENS)
        rate = (answer.tokens - 1) / (answer.total_ms - answer.ttft_ms) * 1000
        print(f"  first token {answer.ttft_ms:.0f} ms, then {rate:.2f} tokens/s", flush=True)
    backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--work", type=Path, required=True, help="folder for both checkpoints; not removed")
    parser.add_argument("--stage", choices=STAGES, help="only this one, in this process")
    options = parser.parse_args()
    if options.stage:
        run_stage(options.stage, options.preset, options.work)
        return
    for stage in STAGES:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--stage", stage], check=True)


if __name__ == "__main__":
    main()
