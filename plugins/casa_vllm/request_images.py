"""The images of one request, as scheduler and worker both see them.

Both sides derive the position of an image's pages in the request's row from the request's
multimodal features, so that it need not be sent:

    images            0    1    2         K = 4, 9, 9       pages = 2, 1, 3
    row, base 0       a a  b    c c c
    row, base 1       b    c c c                           (image 0 was dead when the row was sent)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from casa_engine.windows import last_window


@dataclass(frozen=True)
class RequestImages:
    """Insertion points and sizes of a request's M images.

    Attributes:
        points: (M,) int64, ascending: index in the text stream of the first token after the image.
        num_tokens: (M,) int64, image tokens of each image.
    """

    points: np.ndarray
    num_tokens: np.ndarray

    @classmethod
    def from_features(cls, features: Sequence[Any]) -> "RequestImages":
        """Read vLLM's `MultiModalFeatureSpec`s (see processing.py for how images are attached)."""
        positions = [feature.mm_position for feature in features]
        return cls(
            np.array([position.offset for position in positions], dtype=np.int64),
            np.array([position.get_num_embeds() for position in positions], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.points)

    def first_live(self, num_tokens: int) -> int:
        """Return the first image that text token `num_tokens` or a later one can still see."""
        return last_window(num_tokens, self.points)[1]

    def end_before(self, num_tokens: int) -> int:
        """Return the number of images whose window opens before text token `num_tokens`."""
        return int(np.searchsorted(self.points, num_tokens, side="left"))

    def num_pages(self, block_size: int) -> np.ndarray:
        """Return (M,) int64: cache pages of each image; every image starts a page."""
        return -(-self.num_tokens // block_size)
