"""State of B exported conversations: what `CasaCache` is to the eager model."""

from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from casa_export.backend import Handle


@dataclass(frozen=True, eq=False)
class SeenImage:
    """One image of a conversation.

    Attributes:
        point: Insertion point in the row's text stream.
        embeds: float32 (N, C). Output of the vision graph.
        positions: int64 (3, N). Rotary positions relative to the window.
    """

    point: int
    embeds: np.ndarray
    positions: np.ndarray


@dataclass
class ExportedCache:
    """Cache of B conversations that go on together.

    Attributes:
        positions: int64 (B, P). Text-stream index of each cached text token, -1 for padding; None when empty.
        window_positions: int64 (B, Pw). The same for the CA text cache (`ca_tv`).
        text: Self-attention caches by input name.
        window_text: CA text caches by input name.
        images: For each row the images of its last window.
        image_kv: Keys and values of `image_kv_of` by input name.
        image_kv_of: For each row the images that `image_kv` was computed from; None before the first.
    """

    positions: np.ndarray | None = None
    window_positions: np.ndarray | None = None
    text: dict[str, Handle] = field(default_factory=dict)
    window_text: dict[str, Handle] = field(default_factory=dict)
    images: list[list[SeenImage]] = field(default_factory=list)
    image_kv: dict[str, Handle] = field(default_factory=dict)
    image_kv_of: list[list[SeenImage]] | None = None

    def num_tokens(self) -> np.ndarray:
        """Return the number of text tokens of each row, padding excluded, int64 (B,)."""
        return (self.positions >= 0).sum(axis=1)

    def copy(self) -> Self:
        """Return an independent copy. Arrays are shared: calls replace them and change none."""
        return replace(
            self, images=[list(images) for images in self.images], text=dict(self.text), image_kv=dict(self.image_kv)
        )

    def assign(self, other: Self) -> None:
        """Replace this cache's state by another's. Mutates this one."""
        vars(self).update(vars(other))
