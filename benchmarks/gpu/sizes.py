"""What is measured on a GPU, and the tiny sizes with which the same code is tried on a CPU."""

import os
from dataclasses import dataclass

import torch

from casa_engine.configuration import CasaConfig

PREFILL_TOKENS = 16


@dataclass(frozen=True)
class Sizes:
    """Sizes of all measurements, and where they run.

    Attributes:
        sides: Pixels of square frames.
        num_seqs: Sequences that decode at once.
        max_text: Longest text of a sequence.
        decode_tokens: Tokens of each sequence in a measurement of decoding.
        frames: First tokens that are measured of each side.
        device: Of the models without an engine.
        dtype: Of the weights.
    """

    sides: tuple[int, ...]
    num_seqs: tuple[int, ...]
    max_text: int
    decode_tokens: int
    frames: int
    device: torch.device
    dtype: torch.dtype


FULL = Sizes((448, 896), (1, 8, 32, 128), 256, 128, 9, torch.device("cuda"), torch.bfloat16)
TINY = Sizes((56, 112), (1, 2), 32, 12, 3, torch.device("cpu"), torch.float32)


def sizes(*, is_tiny: bool) -> Sizes:
    """Return the sizes; tiny models are not shared out to a machine's every thread."""
    if is_tiny:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return TINY if is_tiny else FULL


def num_image_tokens(config: CasaConfig, side: int) -> int:
    """Image tokens of a square image of `side` pixels."""
    return (side // config.vision_config.patch_size // config.vision_config.spatial_merge_size) ** 2
