"""The truth about the page's own clip, which `casa-digits-video` made (docs/live.md)."""

from pathlib import Path

import numpy as np

import casa_serving
from casa_digits.video import caption_spans, draw_scenes

# The same in H.264 and in VP9.
CLIPS = sorted((Path(casa_serving.__file__).parent / "web").glob("digits.*"))
SECONDS, FPS, SEED, SCALE = 40, 10, 3, 2


def clip_scenes():
    """Return the scenes that it shows."""
    rng, _ = np.random.default_rng(SEED).spawn(2)
    return draw_scenes(rng, SECONDS * FPS, FPS)


def clip_truth():
    """Return what can be read in it when."""
    return caption_spans(clip_scenes(), FPS)
