"""What a runtime must offer to `ExportedModel`: running a graph, with caches that stay where the runtime keeps them."""

from typing import Any, Protocol

import numpy as np

# A tensor in the runtime's own memory: an OrtValue, or a CUDA tensor. Only backends look inside.
Handle = Any


class Backend(Protocol):
    """Runs the three graphs."""

    def run(
        self, graph: str, host: dict[str, np.ndarray], resident: dict[str, Handle], fetch: str | None
    ) -> tuple[np.ndarray | None, dict[str, Handle]]:
        """Run one graph.

        Args:
            graph: `vision`, `image_kv` or `decoder`.
            host: Inputs from ordinary memory.
            resident: Inputs that a run returned, or `empty`; not copied.
            fetch: The one output to bring to ordinary memory; None for none.

        Returns:
            That output, and handles of all others by name.
        """

    def empty(self, shape: tuple[int, ...]) -> Handle:
        """Return a cache without tokens, in the model's dtype: one axis of `shape` is 0."""
