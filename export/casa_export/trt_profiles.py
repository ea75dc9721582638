"""Optimisation profiles: for every input of a graph its smallest, usual and largest shape.

They follow from the manifest's axes. The decoder has two: `prefill`, for pieces of a prompt, and `decode`, for one
token a row; both reach down to empty caches and no image.
"""

from dataclasses import dataclass

from casa_engine.errors import InputError
from casa_export.graph_spec import axis_size
from casa_export.manifest import Manifest

Shape = tuple[int, ...]
# What to tune for, where the limits allow it.
USUAL = {
    "batch": 1,
    "image_tokens": 256,
    "windows": 16,
    "window_slots": 16,
    "tokens": 64,
    "logits": 1,
    "past": 512,
    "window_past": 128,
}


@dataclass(frozen=True)
class Profile:
    """One optimisation profile of a graph.

    Attributes:
        name: `prefill`, `decode` or `any`.
        shapes: Smallest, usual and largest shape of each input by name.
    """

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]

    def check(self, graph: str, name: str, shape: Shape) -> None:
        """Raise InputError if an input's shape lies outside the profile."""
        low, _, high = self.shapes[name]
        fits = len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
        if not fits:
            raise InputError(
                f"{name} of graph {graph} has shape {shape}; profile {self.name!r} of the engine takes {low} to "
                f"{high}. Send less at once, or export and build again with larger limits."
            )


def build_profiles(manifest: Manifest, graph: str) -> list[Profile]:
    """Return the optimisation profiles of a graph.

    Args:
        manifest: Of the exported folder.
        graph: `vision`, `image_kv` or `decoder`.
    """
    axes = manifest.axes[graph]
    if graph != "decoder":
        return [_profile(manifest, graph, "any", axes)]
    return [
        _profile(manifest, graph, "prefill", axes),
        _profile(manifest, graph, "decode", axes | {"tokens": (1, 1), "logits": (1, 1)}),
    ]


def _profile(manifest: Manifest, graph: str, name: str, axes: dict[str, tuple[int, int]]) -> Profile:
    low = {axis: sizes[0] for axis, sizes in axes.items()}
    high = {axis: sizes[1] for axis, sizes in axes.items()}
    usual = {axis: max(low[axis], min(high[axis], USUAL[axis])) for axis in axes}
    return Profile(
        name,
        {
            tensor.name: tuple(tuple(axis_size(axis, sizes) for axis in tensor.axes) for sizes in (low, usual, high))
            for tensor in manifest.graphs[graph].inputs
        },
    )
