"""`casa-checkpoint`: random checkpoints, checks and packages of folders, published checkpoints read and converted."""

import argparse
import sys
from pathlib import Path

import torch

from casa_engine.atomic_files import write_atomically
from casa_engine.checkpoints import check_tensors, load_model, load_processor, read_config, write_random_checkpoint
from casa_engine.code_package import write_package
from casa_engine.command import run_command
from casa_engine.configuration import CA_PLACEMENTS, CA_WEIGHTS, FUSIONS
from casa_engine.errors import CheckpointError
from casa_engine.originals.converting import convert
from casa_engine.originals.map_file import read_maps
from casa_engine.originals.plan import make_plan
from casa_engine.originals.report import caveats, proposals_as_map, report
from casa_engine.originals.snapshot import read_snapshot, write_headers_file
from casa_engine.originals.verifying import verify
from casa_engine.originals.views import OWN_MAP
from casa_engine.presets import PRESETS, preset_config

DESCRIPTION = "Writes random checkpoints, checks and packages folders, and reads and converts published checkpoints."
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
    inspect = commands.add_parser("inspect", help="compare a published checkpoint with what the engine knows")
    inspect.add_argument("original", type=Path, metavar="FOLDER", help="its folder, or a headers file")
    inspect.add_argument("--headers-only", type=Path, metavar="OUT.json", help="write a headers file, without weights")
    inspect.add_argument("--proposals", type=Path, metavar="MAP", help="write places for unknown tensors as a map file")
    convert = commands.add_parser("convert", help="write a published checkpoint in the engine's form")
    convert.add_argument("original", type=Path, metavar="FOLDER")
    convert.add_argument("output", type=Path, metavar="OUT")
    for command in (inspect, convert):
        command.add_argument(
            "--map", type=Path, action="append", default=[], help="map file (docs/checkpoints.md); the last one counts"
        )
    verify = commands.add_parser("verify", help="compare a checkpoint with what the original's own code answers")
    verify.add_argument("folder", type=Path, help="a converted checkpoint, or an original")
    verify.add_argument(
        "--reference", type=Path, required=True, metavar="FILE", help="written by scripts/reference_outputs.py"
    )
    check = commands.add_parser("check", help="check that a folder holds the model of its config.json")
    check.add_argument("folder", type=Path)
    package = commands.add_parser("package", help="add the model's code, for transformers without casa-engine")
    package.add_argument("folder", type=Path)
    package.add_argument("output", type=Path, metavar="OUT")
    return parser


def main(arguments: list[str] | None = None, program: str = "casa-checkpoint") -> int:
    """Run the command; return the exit status. `program` is its name in messages."""
    options = build_parser(program).parse_args(arguments)
    return run_command(program, lambda: WORK[options.command](options))


def _check(options: argparse.Namespace) -> None:
    check_tensors(options.folder, read_config(options.folder))
    print(f"{options.folder}: complete.")


def _package(options: argparse.Namespace) -> None:
    write_package(options.folder, options.output)
    print(f"{options.output}: {options.folder} with its code, for transformers with trust_remote_code=True.")


def _inspect(options: argparse.Namespace) -> None:
    snapshot, user = read_snapshot(options.original), read_maps(_maps(options))
    if options.headers_only is not None:
        write_headers_file(snapshot, options.headers_only)
        print(f"{options.headers_only}: {options.headers_only.stat().st_size} bytes, no weights.")
    plan = make_plan(snapshot, user)
    for line in report(plan):
        print(line)
    if options.proposals is not None:
        text = proposals_as_map(make_plan(snapshot, user, with_proposals=True))
        write_atomically(options.proposals, text.encode())
        print(
            f"{options.proposals}: proposals, for you to check. Then convert {options.original} with "
            f"--map {options.proposals}."
        )
        return
    plan.check()
    print(f"{options.original}: every tensor has its place.")


def _maps(options: argparse.Namespace) -> list[Path]:
    """Map files of the command line, or the original's own where there is none."""
    own = options.original / OWN_MAP
    return options.map or ([own] if own.is_file() else [])


def _convert(options: argparse.Namespace) -> None:
    plan = make_plan(read_snapshot(options.original), read_maps(_maps(options)))
    convert(plan, options.output)
    print(f"{options.output}: converted from {options.original}, fingerprint {plan.snapshot.fingerprint[:16]}.")
    for line in caveats(plan):
        print(line)


def _write_random(options: argparse.Namespace) -> None:
    fields = {name: getattr(options, name) for name in ("fusion", "ca_weights", "ca_placement", "ca_layers")}
    config = preset_config(
        options.preset,
        **{name: value for name, value in fields.items() if value is not None},
    )
    write_random_checkpoint(config, options.folder, options.seed, DTYPES[options.dtype])
    print(f"{options.folder}: {options.preset}, random weights (seed {options.seed}, {options.dtype}).")


def _verify(options: argparse.Namespace) -> None:
    failed = []
    processor = load_processor(options.folder)
    prompt = processor.apply_chat_template([{"role": "user", "content": "?"}])
    has_bos = bool(processor.tokenizer.bos_token) and prompt.startswith(processor.tokenizer.bos_token)
    for comparison in verify(load_model(options.folder), options.reference, has_bos):
        print(f"{'ok  ' if comparison.passed else 'FAIL'} {comparison.what}: {comparison.found}", flush=True)
        failed += [] if comparison.passed else [comparison.what]
    if failed:
        raise CheckpointError(f"{options.folder} differs from {options.reference} in {', '.join(failed)}.")


WORK = {
    "random": _write_random,
    "check": _check,
    "package": _package,
    "inspect": _inspect,
    "convert": _convert,
    "verify": _verify,
}

if __name__ == "__main__":
    sys.exit(main())
