"""Decode speed and time to first token: ONNX Runtime on the CPU against the eager model, in one run.

    python benchmarks/export_decode.py              the embedded model and a random one of 200 million weights
    python benchmarks/export_decode.py --models embedded --threads 2

Both answer the same prompt (one image of the digits' size, 64 tokens of text) through `CasaStream`, alternately, so
that whatever else the machine does falls on both; the median counts.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from transformers import LlamaConfig

from casa_engine.checkpoints import load_model, write_random_checkpoint
from casa_engine.configuration import CasaConfig
from casa_engine.digits import checkpoint_path
from casa_engine.presets import preset_config
from casa_engine.streaming import CasaStream
from casa_export.exported_model import ExportedModel
from casa_export.exporter import export_checkpoint

GRID = torch.tensor([[1, 4, 12]])
NUM_TEXT_TOKENS = 64


def random_200m() -> CasaConfig:
    """A Helium-like backbone with CA of its own in every layer: 200 million parameters in all."""
    tiny = preset_config("tiny-llama", fusion="ca")
    text = LlamaConfig(
        vocab_size=16000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=10,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        eos_token_id=1,
        pad_token_id=0,
    )
    vision = tiny.vision_config.to_dict() | {"hidden_size": 512, "intermediate_size": 1536, "num_heads": 8, "depth": 8}
    vision |= {"out_hidden_size": 1024, "fullatt_block_indexes": [3, 7]}
    return CasaConfig(text_config=text, vision_config=vision, fusion="ca", image_token_id=381)


def measure(model, num_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and decoded tokens per second after it."""
    pixels = torch.randn(int(GRID.prod()), 1176, generator=torch.Generator().manual_seed(0))
    stream = CasaStream(model, stop_token_ids=[])
    started = time.perf_counter()
    stream.feed([5 + index % 200 for index in range(NUM_TEXT_TOKENS)], pixels, GRID, [8])
    stream.generate(1)
    first = time.perf_counter()
    stream.generate(num_tokens)
    return first - started, num_tokens / (time.perf_counter() - first)


def compare(name: str, checkpoint: Path, folder: Path, threads: int, num_tokens: int, rounds: int) -> None:
    """Export what is not exported yet, measure both alternately and print a line."""
    started = time.perf_counter()
    if not (folder / "manifest.json").is_file():
        export_checkpoint(checkpoint, folder)
    export_s = time.perf_counter() - started
    models = {"eager": load_model(checkpoint), "onnx": ExportedModel.load(folder, num_threads=threads)}
    millions = sum(parameter.numel() for parameter in models["eager"].parameters()) / 1e6
    samples: dict[str, list[tuple[float, float]]] = {kind: [] for kind in models}
    for model in models.values():
        measure(model, 4)
    for _ in range(rounds):
        for kind, model in models.items():
            samples[kind].append(measure(model, num_tokens))
    median = {kind: [statistics.median(column) for column in zip(*rows, strict=True)] for kind, rows in samples.items()}
    ratio = median["onnx"][1] / median["eager"][1]
    print(
        f"| {name} ({millions:.1f} M) | {median['eager'][0] * 1e3:.1f} | {median['onnx'][0] * 1e3:.1f} "
        f"| {median['eager'][1]:.1f} | {median['onnx'][1]:.1f} | {ratio:.2f}x | {export_s:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("embedded", "200m"), default=["embedded", "200m"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keeps the exports here, and uses those that are there already")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {options.threads} threads, fp32")
    print("| model | eager TTFT ms | ONNX TTFT ms | eager tok/s | ONNX tok/s | decode | export s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        if "embedded" in options.models:
            compare("embedded", checkpoint_path(), work / "embedded-onnx", options.threads, 128, options.rounds)
        if "200m" in options.models:
            if not (work / "200m").is_dir():
                write_random_checkpoint(random_200m(), work / "200m")
            compare("random", work / "200m", work / "200m-onnx", options.threads, 24, options.rounds)


if __name__ == "__main__":
    main()
