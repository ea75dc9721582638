"""Decode of exported models by threads of ONNX Runtime, spinning or not, beside eager, on one and two cores.

    python benchmarks/export_threads.py --work DIR         keeps the exports in DIR for the next time
    python benchmarks/export_threads.py --models embedded

Each cell is a process of its own, bound to the cores; "busy" has one more process that computes on each of them. The
cells of a model go round several times and the median counts, so that other load falls on all of them.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from export_decode import measure, random_200m

from casa_engine.checkpoints import load_model, write_random_checkpoint
from casa_engine.configuration import CasaConfig
from casa_engine.digits import checkpoint_path
from casa_engine.presets import preset_config
from casa_export.exported_model import ExportedModel
from casa_export.exporter import export_checkpoint

NUM_TOKENS = {"embedded": 48, "20m": 24, "200m": 8}
WAYS = ("eager", "default", "1", "2", "chosen")


def random_20m() -> CasaConfig:
    """A size between the others: 20 million weights."""
    config = preset_config("tiny-llama", fusion="ca")
    text = config.text_config.to_dict() | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
    text |= {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 4000,
        "layer_types": None,
    }
    vision = config.vision_config.to_dict() | {"out_hidden_size": 512}
    return CasaConfig(**(config.to_dict() | {"text_config": text, "vision_config": vision}))


def prepare(model: str, work: Path) -> tuple[Path, Path]:
    """Checkpoint and export of a model, made where they are missing."""
    checkpoint, folder = work / model, work / f"{model}-onnx"
    if model == "embedded":
        checkpoint = checkpoint_path()
    elif not checkpoint.is_dir():
        write_random_checkpoint(random_20m() if model == "20m" else random_200m(), checkpoint)
    if not folder.is_dir():
        export_checkpoint(checkpoint, folder)
    return checkpoint, folder


def decode(checkpoint: Path, folder: Path, way: str, num_tokens: int) -> float:
    """Tokens per second in this process."""
    if way == "eager":
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        model = load_model(checkpoint)
    elif way == "default":  # as ONNX Runtime is without options: a thread for each core, which spins
        import onnxruntime

        from casa_export import ort_backend

        ort_backend.session_options = lambda num_threads: onnxruntime.SessionOptions()
        model = ExportedModel.load(folder, check_hashes=False)
    else:
        model = ExportedModel.load(folder, num_threads=0 if way == "chosen" else int(way), check_hashes=False)
    measure(model, 2)
    return measure(model, num_tokens)[1]


def compute_for_ever(core: int) -> None:
    """Keeps a core busy."""
    os.sched_setaffinity(0, {core})
    while True:
        pass


def cell(arguments: list[str], cores: list[int], busy: bool) -> float:
    """One measurement, in a process of its own on these cores."""
    with ExitStack() as stack:
        for core in cores if busy else []:
            other = multiprocessing.get_context("fork").Process(target=compute_for_ever, args=(core,), daemon=True)
            other.start()
            stack.callback(other.kill)
        command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, __file__, "--cell", *arguments]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NUM_TOKENS, default=list(NUM_TOKENS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        checkpoint, folder, way, num_tokens = options.cell
        print(decode(Path(checkpoint), Path(folder), way, int(num_tokens)))
        return
    cores = sorted(os.sched_getaffinity(0))[:2]
    print(f"| model | cores | load | {' | '.join(WAYS)} |\n|---|---:|---|{'---:|' * len(WAYS)}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for model in options.models:
            checkpoint, folder = prepare(model, options.work or Path(temporary))
            found = defaultdict(list)
            cases = [(count, busy) for count in (1, 2) for busy in (False, True)]
            for _ in range(options.rounds):
                for case in cases:
                    for way in WAYS:
                        arguments = [str(checkpoint), str(folder), way, str(NUM_TOKENS[model])]
                        found[*case, way].append(cell(arguments, cores[: case[0]], case[1]))
            for count, busy in cases:
                speeds = [f"{statistics.median(found[count, busy, way]):.1f}" for way in WAYS]
                print(f"| {model} | {count} | {'busy' if busy else 'quiet'} | {' | '.join(speeds)} |", flush=True)


if __name__ == "__main__":
    main()
