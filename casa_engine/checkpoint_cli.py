"""`casa-checkpoint`: writes a random checkpoint of a preset, or checks a checkpoint folder."""

import argparse
import sys
from pathlib import Path

import torch

from casa_engine.checkpoints import check_tensors, read_config, write_random_checkpoint
from casa_engine.command import run_command
from casa_engine.configuration import CA_PLACEMENTS, CA_WEIGHTS, FUSIONS
from casa_engine.presets import PRESETS, preset_config

DESCRIPTION = "Writes a random checkpoint of a preset, or checks a checkpoint folder."
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_parser(program: str = "casa-checkpoint") -> argparse.ArgumentParser:
    """Return the parser; `program` is the command's name in messages."""
    parser = argparse.ArgumentParser(prog=program, description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    random = commands.add_parser("random", help="write a checkpoint with random weights")
    random.add_argument("preset", choices=PRESETS)
    random.add_argument("folder", type=Path)
    random.add_argument("--fusion", choices=FUSIONS, help="default: the preset's")
    random.add_argument("--ca-weights", choices=CA_WEIGHTS)
    random.add_argument("--ca-placement", choices=CA_PLACEMENTS)
    random.add_argument(
        "--ca-layers",
        type=int,
        nargs="+",
        help="layers with cross-attention; default: the preset's",
    )
    random.add_argument("--dtype", choices=DTYPES, default="fp32")
    random.add_argument("--seed", type=int, default=0)
    check = commands.add_parser("check", help="check that a folder holds the model of its config.json")
    check.add_argument("folder", type=Path)
    return parser


def main(arguments: list[str] | None = None, program: str = "casa-checkpoint") -> int:
    """Run the command; return the exit status. `program` is its name in messages."""
    options = build_parser(program).parse_args(arguments)
    return run_command(program, lambda: (_check if options.command == "check" else _write_random)(options))


def _check(options: argparse.Namespace) -> None:
    check_tensors(options.folder, read_config(options.folder))
    print(f"{options.folder}: complete.")


def _write_random(options: argparse.Namespace) -> None:
    fields = {name: getattr(options, name) for name in ("fusion", "ca_weights", "ca_placement", "ca_layers")}
    config = preset_config(
        options.preset,
        **{name: value for name, value in fields.items() if value is not None},
    )
    write_random_checkpoint(config, options.folder, options.seed, DTYPES[options.dtype])
    print(f"{options.folder}: {options.preset}, random weights (seed {options.seed}, {options.dtype}).")


if __name__ == "__main__":
    sys.exit(main())
