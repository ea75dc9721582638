"""The header of a safetensors file: names, types and shapes of its tensors, read without trusting the file.

    8 bytes: length of the header | header, JSON: {"name": {"dtype", "shape", "data_offsets"}} | data

Everything is bounded before it is read or computed, and what the header says must fill the file exactly.
"""

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casa_engine.errors import CheckpointError

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 100_000
MAX_AXES = 8
MAX_NAME_LENGTH = 512
NAME = re.compile(r"[\w.\-/:]+")
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor.

    Attributes:
        dtype: As safetensors names it, such as "BF16".
        shape: Its shape.
        file: Name of its file.
        start: Where its data begins in the file; None where the file itself is not here.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int | None = None

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a file by their names, in the order in which their data lies.

    Raises:
        CheckpointError: The file is no safetensors file; its header is too large; or names, types, shapes and places
            of the tensors contradict each other or the file's size.
    """
    try:
        return _read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}.") from error


def check_name(name: Any) -> None:
    """Raise ValueError unless a name, as some file gives it, can be a tensor's."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_LENGTH:
        raise ValueError(f"a tensor's name is {str(name)[:40]!r}; expected up to {MAX_NAME_LENGTH} characters")
    if not NAME.fullmatch(name):  # it is written into map files and onto terminals
        raise ValueError(f"a tensor's name is {name[:40]!r}; expected letters, digits and _ . - / : alone")


def check_tensor(name: Any, dtype: Any, shape: Any) -> None:
    """Raise ValueError unless name, type and shape, as some file gives them, can be those of a tensor."""
    check_name(name)
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{name} has dtype {dtype!r}; expected one of {', '.join(DTYPE_BYTES)}")
    if not isinstance(shape, list) or len(shape) > MAX_AXES:
        raise ValueError(f"{name} has shape {str(shape)[:40]}; expected a list of up to {MAX_AXES} numbers")
    if any(type(size) is not int or not 0 <= size < 2**40 for size in shape):
        raise ValueError(f"{name} has shape {shape}; expected numbers from 0")


def _read(path: Path) -> dict[str, TensorHeader]:
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or header_bytes > file_bytes - 8:
            raise ValueError(f"its header should have {header_bytes} bytes, the file has {file_bytes}")
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {header_bytes} bytes; expected at most {MAX_HEADER_BYTES}")
        content = json.loads(file.read(header_bytes), object_pairs_hook=_without_duplicates)
    content.pop("__metadata__", None)
    if len(content) > MAX_TENSORS:
        raise ValueError(f"it names {len(content)} tensors; expected at most {MAX_TENSORS}")
    places = []
    for name, entry in content.items():
        check_tensor(name, entry["dtype"], entry["shape"])
        start, end = entry["data_offsets"]
        header = TensorHeader(entry["dtype"], tuple(entry["shape"]), path.name, 8 + header_bytes + start)
        if type(start) is not int or type(end) is not int or end - start != header.num_bytes:
            raise ValueError(f"{name} lies at {start} to {end}; expected {header.num_bytes} bytes")
        places.append((start, end, name, header))
    places.sort(key=lambda place: place[:3])
    position = 0
    for start, end, name, _ in places:
        if start != position:
            what = "overlaps the tensor before it" if start < position else "does not follow the tensor before it"
            raise ValueError(f"{name} {what}: it starts at {start}, expected {position}")
        position = end
    if position != file_bytes - 8 - header_bytes:
        raise ValueError(f"its tensors have {position} bytes, the file holds {file_bytes - 8 - header_bytes}")
    return {name: header for _, _, name, header in places}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"it names {twice[:80]!r} twice")
    return result
