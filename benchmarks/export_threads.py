"""Decode of exported models by threads of ONNX Runtime, spinning or not, beside eager, on one and two cores.

    python benchmarks/export_threads.py --work DIR                       keeps the exports in DIR for the next time
    python benchmarks/export_threads.py --models embedded --seconds 0.2  a try

Prints a Markdown table for docs/benchmarks.md, each row as soon as it is measured. Each number is measured in processes
of its own, bound to the cores, one in each of three rounds: one after the other in one process, the same way differed
by up to 40%. "busy" has one more process that computes on each core. Of each way the median counts, of short bursts and
of the rounds. What is not measured within the time limit of its row is "-".
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import onnxruntime
import torch
from export_decode import GRID, NUM_TEXT_TOKENS, random_200m

from casa_engine.checkpoints import load_model, write_random_checkpoint
from casa_engine.configuration import CasaConfig
from casa_engine.digits import checkpoint_path
from casa_engine.presets import preset_config
from casa_engine.streaming import CasaStream
from casa_export import ort_backend
from casa_export.exported_model import ExportedModel
from casa_export.exporter import export_checkpoint

MODELS = ("embedded", "20m", "200m")
WAYS = {
    "eager": "eager",
    "default": "ONNX Runtime's default",
    "1": "1 thread",
    "2": "2 threads",
    "chosen": "chosen by size",
}
BURST_TOKENS = 4
ROUNDS = 3
# Each number's process is forked from here, where no library has started threads yet.
PROCESSES = multiprocessing.get_context("fork")


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
    if not folder.is_dir():
        maker = PROCESSES.Process(target=make, args=(model, checkpoint, folder))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"{model}: the export failed, see above.")
    return checkpoint, folder


def make(model: str, checkpoint: Path, folder: Path) -> None:
    """Write what `prepare` lacks."""
    if not checkpoint.is_dir():
        write_random_checkpoint(random_20m() if model == "20m" else random_200m(), checkpoint)
    export_checkpoint(checkpoint, folder)


def load(checkpoint: Path, folder: Path, way: str):
    """A model that computes in one of `WAYS`."""
    if way == "eager":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        return load_model(checkpoint)
    if way == "default":  # as ONNX Runtime is without options: a thread for each core, which spins
        with mock.patch.object(ort_backend, "session_options", lambda num_threads: onnxruntime.SessionOptions()):
            return ExportedModel.load(folder, check_hashes=False)
    return ExportedModel.load(folder, num_threads=0 if way == "chosen" else int(way), check_hashes=False)


def decode_speed(model, seconds: float) -> float:
    """Decoded tokens per second after one image and a prompt: the median of bursts, at least one."""
    pixels = torch.randn(int(GRID.prod()), 1176, generator=torch.Generator().manual_seed(0))
    stream = CasaStream(model, stop_token_ids=[])
    stream.feed([5 + index % 200 for index in range(NUM_TEXT_TOKENS)], pixels, GRID, [8])
    stream.generate(2)
    speeds, started = [], time.perf_counter()
    while not speeds or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        stream.generate(BURST_TOKENS)
        speeds.append(BURST_TOKENS / (time.perf_counter() - before))
    return statistics.median(speeds)


def measure(result: Connection, checkpoint: Path, folder: Path, way: str, cores: list[int], seconds: float) -> None:
    """Send the speed of a way."""
    os.sched_setaffinity(0, cores)
    result.send(decode_speed(load(checkpoint, folder, way), seconds))


def compute_for_ever(core: int) -> None:
    """Keep a core busy."""
    os.sched_setaffinity(0, {core})
    while True:
        pass


def row(checkpoint: Path, folder: Path, cores: list[int], busy: bool, seconds: float, limit_s: float) -> list[float]:
    """Speeds of the ways, in order: of each the median over the rounds, NaN where the time limit let none come."""
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    end = time.monotonic() + limit_s
    with ExitStack() as stack:
        for core in cores if busy else []:
            other = PROCESSES.Process(target=compute_for_ever, args=(core,), daemon=True)
            other.start()
            stack.callback(other.kill)
        # The way that comes first is another one in each round.
        ways = list(WAYS)
        for way in [each for number in range(ROUNDS) for each in ways[number:] + ways[:number]]:
            receiver, sender = PROCESSES.Pipe(duplex=False)
            arguments = (sender, checkpoint, folder, way, cores, seconds)
            worker = PROCESSES.Process(target=measure, args=arguments, daemon=True)
            worker.start()
            sender.close()
            try:
                if receiver.poll(max(0.0, end - time.monotonic())):
                    speeds[way].append(receiver.recv())
            except EOFError:
                print(f"{way}: ended without a number, see above", file=sys.stderr)
            worker.kill()
            worker.join()
    return [statistics.median(found) if found else math.nan for found in speeds.values()]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["embedded", "20m"])
    parser.add_argument("--seconds", type=float, default=1.5, help="of decoding for each number (%(default)s)")
    parser.add_argument("--row-limit", type=float, default=180.0, help="most seconds for a row (%(default)s)")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    print(
        f"`benchmarks/export_threads.py`, ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__}, tokens "
        f"per second while decoding; load of the machine before it began: {os.getloadavg()[0]:.1f}.\n"
    )
    print(f"| model | cores | load | {' | '.join(WAYS.values())} |\n|---|---:|---|{'---:|' * len(WAYS)}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for model in options.models:
            checkpoint, folder = prepare(model, options.work or Path(temporary))
            for count in range(1, len(cores) + 1):
                for busy in (False, True):
                    speeds = row(checkpoint, folder, cores[:count], busy, options.seconds, options.row_limit)
                    cells = ["-" if math.isnan(speed) else f"{speed:.1f}" for speed in speeds]
                    load_name = "busy" if busy else "quiet"
                    print(f"| {model} | {count} | {load_name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
