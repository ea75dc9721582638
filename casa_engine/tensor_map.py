"""The tensor map of a checkpoint whose weights have other names: which of ours each stored tensor becomes.

tensor_map.json: {"stored name": [["our name", first row, last row + 1], ...]}; rows are null for the whole tensor. A
stored tensor with several parts is cut along its first axis, as for fused projections; one with none is not loaded.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from casa_engine.errors import CheckpointError
from casa_engine.json_files import read_object
from casa_engine.safetensors_header import TensorHeader
from casa_engine.weight_files import Shapes, stored_tensors

MAP_FILE = "tensor_map.json"
CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Part:
    """A stored tensor, or some of its rows, under one of our names.

    Attributes:
        name: Our name.
        rows: First row and the one after the last; None for all of a tensor.
    """

    name: str
    rows: tuple[int, int] | None = None

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part."""
        return stored if self.rows is None else (self.rows[1] - self.rows[0], *stored[1:])


@dataclass(frozen=True)
class TensorMap:
    """Parts by the stored tensor's name; every stored tensor has an entry."""

    parts: Mapping[str, tuple[Part, ...]]

    def shapes(self, stored: Mapping[str, TensorHeader]) -> Shapes:
        """Names and shapes that the stored tensors become.

        Raises:
            CheckpointError: A stored tensor is not in the map.
        """
        return {part.name: part.shape(header.shape) for name, header in stored.items() for part in self._of(name)}

    def apply(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield our tensors for stored ones, as they come.

        Raises:
            CheckpointError: A stored tensor is not in the map, or holds NaN or infinity.
        """
        for name, tensor in weights:
            parts = self._of(name)
            if parts:
                check_finite(name, tensor)
            for part in parts:
                yield part.name, tensor if part.rows is None else tensor[slice(*part.rows)]

    def as_json(self) -> dict[str, list[list]]:
        """What the file holds."""
        return {
            name: [[part.name, *(part.rows or (None, None))] for part in parts] for name, parts in self.parts.items()
        }

    def _of(self, name: str) -> tuple[Part, ...]:
        if name not in self.parts:
            raise CheckpointError(f"tensor {name} is not in {MAP_FILE}: the weights changed since it was written.")
        return self.parts[name]


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise CheckpointError if a tensor holds NaN or infinity."""
    if tensor.dtype not in CHECKED or not tensor.numel():
        return
    # The extremes are NaN where any value is. `isfinite` of all would take masks, and forty times as long.
    if not all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax()):
        raise CheckpointError(f"tensor {name} holds NaN or infinity; the weights are damaged: download them again.")


def read_tensor_map(folder: str | Path) -> TensorMap | None:
    """Return the map of a checkpoint folder; None where its tensors have our names.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = Path(folder) / MAP_FILE
    if not path.is_file():
        return None
    try:
        content = read_object(path)
        return TensorMap({name: tuple(_part(*part) for part in parts) for name, parts in content.items()})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error


def _part(name: str, start: int | None, stop: int | None) -> Part:
    return Part(name, None if start is None else (int(start), int(stop)))


def stored_shapes(folder: str | Path) -> Shapes:
    """Name and shape, as ours, of each tensor that loading the folder reads (headers only).

    Raises:
        CheckpointError: As `weight_files.stored_tensors`, or weights and map do not fit together.
    """
    stored, tensor_map = stored_tensors(folder), read_tensor_map(folder)
    if tensor_map is None:
        return {name: header.shape for name, header in stored.items()}
    return tensor_map.shapes(stored)


def mapped_weights(folder: str | Path, tensor_map: TensorMap) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a folder's tensors under our names; each stays in its file until it is used.

    Raises:
        CheckpointError: As `TensorMap.apply`.
    """
    for file in sorted({header.file for header in stored_tensors(folder).values()}):
        with safe_open(Path(folder) / file, framework="pt") as tensors:
            yield from tensor_map.apply((name, tensors.get_tensor(name)) for name in tensors.keys())
