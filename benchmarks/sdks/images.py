"""Writes held-out images for the clients beside this file, named after their digits: `python images.py FOLDER`."""

import sys
from pathlib import Path

import numpy as np

from casa_digits.data import draw_image, load_samples

NUM_IMAGES = 10


def main() -> None:
    """Draw the images, the same in every run."""
    folder, rng = Path(sys.argv[1]), np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_IMAGES):
        image = draw_image(rng, load_samples(held_out=True))
        image.to_pil().save(folder / f"{number}-{image.text.replace(' ', '_')}.png")


if __name__ == "__main__":
    main()
