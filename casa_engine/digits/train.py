"""`casa-train-digits`: trains casa-tiny-digits from nothing.

    stage 1   the vision tower, with the truth of every cell         vision_warmup.py
    stage 2   everything else, on conversations and streams          language.py
    then      measured on held-out digits; accuracy.json beside the weights

With the defaults it takes less than an hour on one core, and at most about 3 on a busy machine. One thread is the
default: the model is so small that a second one gains little, and loses a lot on a busy machine. The same seed gives
the same weights on the same machine and versions.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

from casa_engine.checkpoints import save_checkpoint
from casa_engine.digits import checkpoint_path
from casa_engine.digits.conversations import Writer
from casa_engine.digits.data import load_samples
from casa_engine.digits.evaluate import evaluate_eager
from casa_engine.digits.language import teach_language
from casa_engine.digits.live import write_live_settings
from casa_engine.digits.model import MAX_POSITIONS, build_model, build_processor
from casa_engine.digits.tokenizer import build_tokenizer
from casa_engine.digits.vision_warmup import read_exactly, warm_up


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="casa-train-digits", description="Trains casa-tiny-digits from nothing.")
    parser.add_argument("--output", type=Path, default=checkpoint_path(), help="checkpoint folder (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-steps", type=int, default=4000)
    parser.add_argument("--language-steps", type=int, default=5000)
    parser.add_argument("--families", type=int, default=1600, help="families of 8 images encoded at a time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vision-weights", type=Path, help="leaves out stage 1: a file that --keep-vision wrote")
    parser.add_argument("--peak-rate", type=float, default=2e-3, help="highest learning rate of stage 2 (%(default)s)")
    parser.add_argument("--keep-vision", type=Path, help="writes the tower after stage 1 to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Trains, saves, measures."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    tokenizer = build_tokenizer(MAX_POSITIONS)
    model, processor = build_model(tokenizer, options.seed), build_processor(tokenizer)
    vision_rng, language_rng = np.random.default_rng(options.seed).spawn(2)
    samples = load_samples(held_out=False)

    if options.vision_weights:
        model.model.visual.load_state_dict(torch.load(options.vision_weights, weights_only=True))
    else:
        head = warm_up(model.model.visual, vision_rng, samples, options.vision_steps)
        right = read_exactly(model.model.visual, head, np.random.default_rng(1), load_samples(held_out=True), 1000)
        print("vision tower on held-out digits:", json.dumps(right))
    if options.keep_vision:
        torch.save(model.model.visual.state_dict(), options.keep_vision)
    model.model.visual.requires_grad_(False)
    teach_language(
        model,
        Writer(tokenizer, language_rng),
        language_rng,
        samples,
        options.language_steps,
        options.families,
        peak_rate=options.peak_rate,
        save=lambda: save_checkpoint(model, processor, options.output),
    )
    save_checkpoint(model, processor, options.output)
    write_live_settings(options.output)
    record = {
        "command": shlex.join(["casa-train-digits", *(sys.argv[1:] if arguments is None else arguments)]),
        "torch": torch.__version__,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "held_out": evaluate_eager(options.output).as_dict(),
    }
    (options.output / "accuracy.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
