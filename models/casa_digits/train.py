"""`casa-train-digits`: trains casa-tiny-digits from nothing.

    stage 1   the vision tower, with the truth of every cell         vision_warmup.py
    stage 2   everything else, on conversations and streams          language.py, lessons.py
    stage 3   five layers instead of three: finding what was said    the same, practice.py
    stage 4   the same with what is hardest, and copying names       the same
    stage 5   the same with streams that are resumed                 the same
    stage 6   names that stand in another window than the image      the same
    then      measured on held-out digits; accuracy.json beside the weights; the output folder is replaced last,
              by a model that meets every demand; another one is written beside it, and the exit status is 1

With the defaults it takes two hours and a quarter of a core, and more on a busy machine. One thread is the
default: the model is so small that a second one gains little, and loses a lot on a busy machine. The same seed gives
the same weights on the same machine and versions.
"""

import argparse
import dataclasses
import json
import math
import pickle
import shlex
import shutil
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from casa_digits.data import load_samples
from casa_digits.demonstration import write_demonstration
from casa_digits.evaluate import evaluate_eager
from casa_digits.language import teach_language
from casa_digits.live import write_live_settings
from casa_digits.model import MAX_POSITIONS, build_model, build_processor, deepen
from casa_digits.progress import ProgressFile
from casa_digits.stages import STAGES, STEPS, Stage, option_name
from casa_digits.tokenizer import build_tokenizer
from casa_digits.vision_warmup import measure_accuracy, warm_up
from casa_engine.atomic_files import write_atomically
from casa_engine.checkpoint_folder import LAST_FILE, list_files, stage_checkpoint
from casa_engine.checkpoints import save_checkpoint, weight_bytes, write_checkpoint
from casa_engine.command import run_command
from casa_engine.digits import checkpoint_path
from casa_engine.errors import CheckpointError, InputError
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.processing_casa import CasaProcessor
from casa_engine.staged_folder import check_apart


def build_parser(program: str = "casa-train-digits") -> argparse.ArgumentParser:
    """Return the parser; `program` is the command's name in messages."""
    parser = argparse.ArgumentParser(prog=program, description="Trains casa-tiny-digits from nothing.")
    parser.add_argument("--output", type=Path, default=checkpoint_path(), help="checkpoint folder (%(default)s)")
    parser.add_argument("--snapshots", type=Path, help="folder for the unfinished model, written now and then")
    parser.add_argument("--seed", type=int, default=0)
    for number, (name, num_steps) in enumerate(STEPS.items(), start=1):
        parser.add_argument(
            option_name(name), type=int, default=num_steps, help=f"how many steps stage {number} has (%(default)s)"
        )
    rate = STAGES[0].course.peak_rate
    parser.add_argument("--peak-rate", type=float, default=rate, help="highest learning rate of stage 2 (%(default)s)")
    parser.add_argument("--families", type=int, default=400, help="families of 8 images encoded at a time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vision-weights", type=Path, help="leaves out stage 1: a file that --keep-vision wrote")
    parser.add_argument("--progress", type=Path, help="file from which the same command goes on after it was ended")
    parser.add_argument("--keep-vision", type=Path, help="writes the tower after stage 1 to this file")
    parser.add_argument("--language-weights", type=Path, help="leaves out stages 1 and 2: a file of --keep-language")
    parser.add_argument("--keep-language", type=Path, help="writes the model after stage 2 to this file")
    return parser


def main(arguments: list[str] | None = None, program: str = "casa-train-digits") -> int:
    """Train, measure, and then replace the output folder; return the exit status.

    Args:
        arguments: The command line without the command's name; default: this process's.
        program: The command's name in messages.
    """
    options = build_parser(program).parse_args(arguments)
    options.command = shlex.join([*program.split(), *(sys.argv[1:] if arguments is None else arguments)])
    return run_command(program, lambda: train(options))


def train(options: argparse.Namespace) -> None:
    """Train a model; its folder appears whole, with the accuracy that was measured on it.

    Raises:
        CheckpointError: It misses a demand; where the folder holds a checkpoint, that stays, and it is written beside.
        InputError: An option cannot be used.
    """
    check_options(options)
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    tokenizer = build_tokenizer(MAX_POSITIONS)
    model, processor = build_model(tokenizer, options.seed), build_processor(tokenizer)
    if options.vision_weights:
        load_weights(model.model.visual, options.vision_weights, "vision")
    if options.language_weights:
        load_weights(model, options.language_weights, "language")
    progress_file = open_progress(options)
    kept = options.output
    with stage_checkpoint(options.output, weight_bytes(deepen(model, options.seed))) as staged:
        model = teach(model, processor, options, progress_file)
        write_checkpoint(model, processor, staged.path)
        write_live_settings(staged.path)
        write_demonstration(staged.path)
        report = evaluate_eager(staged.path)
        record = {
            "command": options.command,
            "torch": torch.__version__,
            "minutes": round(progress_file.minutes if progress_file else (time.monotonic() - started) / 60, 1),
            "held_out": report.as_dict(),
        }
        (staged.path / "accuracy.json").write_text(json.dumps(record, indent=2) + "\n")
        list_files(staged.path)
        if report.passed or not holds_checkpoint(options.output):
            staged.commit()
        else:
            kept = missed_folder(options.output)
            copy_checkpoint(staged.path, kept)
    if progress_file:
        progress_file.remove()
    print(report.table())
    if not report.passed:
        as_before = "" if kept == options.output else f", and {options.output} is as before"
        raise CheckpointError(f"the model misses a demand. It is in {kept}{as_before}.")


def holds_checkpoint(folder: Path) -> bool:
    """Return whether there is a checkpoint, which a model that misses a demand must not replace."""
    return (folder / LAST_FILE).is_file()


def missed_folder(output: Path) -> Path:
    """Return where such a model is written instead: beside the folder."""
    output = output.resolve()
    return output.with_name(f"{output.name}.missed")


def copy_checkpoint(folder: Path, target: Path) -> None:
    """Write a finished checkpoint to another folder."""
    with stage_checkpoint(target) as staged:
        shutil.copytree(folder, staged.path, dirs_exist_ok=True)
        staged.commit()


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for an option that would end the run only later."""
    for name, least in (*((name, 0) for name in STEPS), ("seed", 0), ("families", 1), ("threads", 1)):
        if getattr(options, name) < least:
            raise InputError(f"{option_name(name)} is {getattr(options, name)}; expected {least} or more.")
    if not 0 < options.peak_rate < math.inf:
        raise InputError(f"--peak-rate is {options.peak_rate}; expected a number above 0.")
    for name, path in (("--keep-vision", options.keep_vision), ("--keep-language", options.keep_language)):
        if path and not path.parent.is_dir():
            raise InputError(f"the folder of {name} {path} does not exist. Make it first.")
        if path and path.is_dir():
            raise InputError(f"{name} {path} is a folder. Name a file.")
    if options.progress and not options.progress.absolute().parent.is_dir():
        raise InputError(f"the folder of --progress {options.progress} does not exist. Make it first.")
    if holds_checkpoint(options.output):
        with stage_checkpoint(missed_folder(options.output)):
            pass
    if options.snapshots:
        check_apart(options.snapshots, options.output)
        with stage_checkpoint(options.snapshots):
            pass  # it can be written, or raises the reason


def open_progress(options: argparse.Namespace) -> ProgressFile | None:
    """Open the file of --progress, if one is named."""
    if options.progress is None:
        return None
    decisive = {name: getattr(options, name) for name in ("seed", *STEPS, "families", "peak_rate")}
    courses = {f"course {stage.course.name}": repr(stage.course) for stage in STAGES}
    return ProgressFile(options.progress, {**decisive, "torch": str(torch.__version__), **courses})


def chosen_stages(options: argparse.Namespace) -> list[Stage]:
    """Return the stages after the first, with the learning rate of --peak-rate."""
    first, *others = STAGES
    return [dataclasses.replace(first, course=dataclasses.replace(first.course, peak_rate=options.peak_rate)), *others]


def load_weights(module: torch.nn.Module, path: Path, stage: str) -> None:
    """Read a file that `--keep-STAGE` wrote."""
    try:
        with path.open("rb") as file:  # Given a path, torch goes by its ending, which the user chose.
            module.load_state_dict(torch.load(file, weights_only=True))
    except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError) as error:
        raise InputError(f"{path} is no file of --keep-{stage}: {error}. Leave --{stage}-weights out.") from error


def keep_weights(module: torch.nn.Module, path: Path) -> None:
    """Write the weights of a tower or a model."""
    content = BytesIO()  # torch.save hides the reason when a disk is full
    torch.save(module.state_dict(), content)
    write_atomically(path, content.getbuffer())


def teach(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    options: argparse.Namespace,
    progress_file: ProgressFile | None = None,
) -> CasaForConditionalGeneration:
    """Run all stages, or what is left of them; return the trained model. Mutates `model`."""
    vision_rng, *rngs = np.random.default_rng(options.seed).spawn(1 + len(STAGES))
    samples, begun = load_samples(held_out=False), progress_file.stage if progress_file else None

    def teach_stage(model: CasaForConditionalGeneration, stage: Stage, rng: np.random.Generator) -> None:
        model.model.visual.requires_grad_(False)
        save = (lambda: save_checkpoint(model, processor, options.snapshots)) if options.snapshots else None
        writer, num_steps = stage.writer(processor.tokenizer, rng), getattr(options, stage.option)
        teach_language(
            model, writer, samples, stage.course, num_steps, options.families, save=save, progress_file=progress_file
        )

    shallow, *deep = zip(chosen_stages(options), rngs, strict=True)
    names = [stage.course.name for stage, _ in deep]
    if not options.language_weights and begun not in names:
        if begun is None:  # otherwise the tower is in the progress, and not in `model` yet
            if not options.vision_weights:
                head = warm_up(model.model.visual, vision_rng, samples, options.vision_steps)
                right = measure_accuracy(model.model.visual, head, np.random.default_rng(1), load_samples(True), 1000)
                print("vision tower on held-out digits:", json.dumps(right))
            if options.keep_vision:
                keep_weights(model.model.visual, options.keep_vision)
        teach_stage(model, *shallow)
        if options.keep_language:
            keep_weights(model, options.keep_language)
    deeper = deepen(model, options.seed)
    for stage, rng in deep[names.index(begun) if begun in names else 0 :]:
        teach_stage(deeper, stage, rng)
    return deeper


if __name__ == "__main__":
    sys.exit(main())
