"""Decode of exported models by threads of ONNX Runtime, spinning or not, beside eager, on one and two cores.

    python benchmarks/export_threads.py --work DIR         keeps the exports in DIR for the next time
    python benchmarks/export_threads.py --models embedded

Each row is a process of its own, bound to the cores; "busy" has one more process that computes on each of them. The
rows of a model go round several times and the median counts, so that other load falls on all of them.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import onnxruntime
import torch
from export_decode import measure, random_200m

from casa_engine.checkpoints import load_model, write_random_checkpoint
from casa_engine.configuration import CasaConfig
from casa_engine.digits import checkpoint_path
from casa_engine.presets import preset_config
from casa_export import ort_backend
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


def load(checkpoint: Path, folder: Path, way: str):
    """A model that computes in one of `WAYS`."""
    if way == "eager":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        return load_model(checkpoint)
    if way == "default":  # as ONNX Runtime is without options: a thread for each core, which spins
        with mock.patch.object(ort_backend, "session_options", lambda num_threads: onnxruntime.SessionOptions()):
            return ExportedModel.load(folder, check_hashes=False)
    return ExportedModel.load(folder, num_threads=0 if way == "chosen" else int(way), check_hashes=False)


def decode(checkpoint: Path, folder: Path, num_tokens: int) -> list[float]:
    """Tokens per second of each way, one after the other, in this process."""
    speeds = []
    for way in WAYS:
        model = load(checkpoint, folder, way)
        measure(model, 2)
        speeds.append(measure(model, num_tokens)[1])
        del model  # and its threads
    return speeds


def compute_for_ever(core: int) -> None:
    """Keeps a core busy."""
    os.sched_setaffinity(0, {core})
    while True:
        pass


def run(arguments: list[str], cores: list[int], busy: bool) -> list[float]:
    """All ways once, in a process of its own on these cores."""
    with ExitStack() as stack:
        for core in cores if busy else []:
            other = multiprocessing.get_context("fork").Process(target=compute_for_ever, args=(core,), daemon=True)
            other.start()
            stack.callback(other.kill)
        command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, __file__, "--run", *arguments]
        return json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NUM_TOKENS, default=list(NUM_TOKENS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        checkpoint, folder, num_tokens = options.run
        print(json.dumps(decode(Path(checkpoint), Path(folder), int(num_tokens))))
        return
    cores = sorted(os.sched_getaffinity(0))[:2]
    print(f"load of this machine: {os.getloadavg()[0]:.1f}; tokens per second")
    print(f"| model | cores | load | {' | '.join(WAYS)} |\n|---|---:|---|{'---:|' * len(WAYS)}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for model in options.models:
            checkpoint, folder = prepare(model, options.work or Path(temporary))
            arguments = [str(checkpoint), str(folder), str(NUM_TOKENS[model])]
            found = {(count, busy): [] for count in (1, 2) for busy in (False, True)}
            for _ in range(options.rounds):
                for count, busy in found:
                    found[count, busy].append(run(arguments, cores[:count], busy))
            for (count, busy), rounds in found.items():
                speeds = [f"{statistics.median(column):.1f}" for column in zip(*rounds, strict=True)]
                print(f"| {model} | {count} | {'busy' if busy else 'quiet'} | {' | '.join(speeds)} |", flush=True)


if __name__ == "__main__":
    main()
