"""Whether the embedded model captions a scene when it was asked about the one before: `captions_after_questions.py`.

Streams as `casa-digits-video` draws them, a frame a scene, in process; after each frame so many of the page's suggested
questions are asked. Prints a line for each number: captions that are right, and left out, of all.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from casa_digits.demonstration import DEMONSTRATION
from casa_digits.runners import EagerRunner, EagerStream
from casa_digits.video import draw_scenes
from casa_engine.digits import checkpoint_path
from casa_engine.live.settings import LiveSettings

NUM_FRAMES, FPS = 400, 10
# Suggested questions after each frame: how many, and the first of them.
ASKED = {0: [], 1: [2], 3: [0, 1, 2]}


def caption_stream(runner: EagerRunner, seed: int, asked: list[int]) -> list[tuple[str, str]]:
    """Return what each scene shows and its caption."""
    rng, _ = np.random.default_rng(seed).spawn(2)
    settings = LiveSettings.for_checkpoint(runner.checkpoint)
    stream = EagerStream(runner, settings.instruction, settings.text_budget)
    captions = []
    for number, scene in enumerate(draw_scenes(rng, NUM_FRAMES, FPS)):
        captions.append((scene.image.text, stream.caption(scene.image.to_pil(), number / 2)))
        for question in asked:
            stream.ask(DEMONSTRATION["questions"][question])
    return captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=Path(checkpoint_path()))
    parser.add_argument("--streams", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runner = EagerRunner(options.checkpoint)
    for number, asked in ASKED.items():
        captions = [pair for seed in range(options.streams) for pair in caption_stream(runner, seed, asked)]
        right, silent = sum(text == said for text, said in captions), sum(not said for _, said in captions)
        print(f"{number} questions after each: {right} right, {silent} left out, of {len(captions)}", flush=True)


if __name__ == "__main__":
    main()
