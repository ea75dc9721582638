"""The files of a checkpoint's weights: one, or shards with an index that says which tensor lies in which.

model.safetensors; or model-00001-of-00002.safetensors, ... and model.safetensors.index.json
"""

import tempfile
from pathlib import Path

from casa_engine.errors import CheckpointError
from casa_engine.json_files import read_json
from casa_engine.safetensors_header import TensorHeader, check_name, read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Shapes = dict[str, tuple[int, ...]]


def stored_tensors(folder: str | Path) -> dict[str, TensorHeader]:
    """Return type, shape and file of each tensor that loading the folder reads, by name (headers only).

    Raises:
        CheckpointError: There are no weights; a file is damaged, missing, or not one of them; or the index and the
            shards do not fit together.
    """
    folder = Path(folder)
    present = {path.name for path in folder.glob("*.safetensors")}
    if not present:
        raise CheckpointError(f"{folder} has no *.safetensors file; expected the model's weights.")
    weight_map = None if WEIGHTS in present else _weight_map(folder, present)
    if weight_map is None and (folder / INDEX).exists():
        raise CheckpointError(f"{folder} has both {WEIGHTS} and {INDEX}; expected one of them: remove the other.")
    needed = {WEIGHTS} if weight_map is None else set(weight_map.values())
    if missing := sorted(needed - present):
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names; copy the whole checkpoint.")
    if stray := sorted(present - needed):
        raise CheckpointError(
            f"{folder} has {', '.join(stray)}, which is not part of the weights in {', '.join(sorted(needed))}; remove "
            "it: programs that read every file would load it."
        )
    tensors: dict[str, TensorHeader] = {}
    for name in sorted(needed):
        of_file = read_header(folder / name)
        listed = of_file.keys() if weight_map is None else {key for key, file in weight_map.items() if file == name}
        if wrong := sorted(listed ^ of_file.keys()):
            raise CheckpointError(
                f"{folder}: {INDEX} and {name} do not fit together: {wrong[0]} is in one of them only; copy the whole "
                "checkpoint."
            )
        tensors |= of_file
    return tensors


def _weight_map(folder: Path, present: set[str]) -> dict[str, str]:
    """Return the file of each tensor, from the index."""
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has {', '.join(sorted(present))} and no {INDEX}; expected {WEIGHTS}, or shards with their "
            "index: copy the whole checkpoint."
        )
    try:
        weight_map = read_json(path)["weight_map"]
        names = set(weight_map.values())
        for name in weight_map:
            check_name(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors: {error!r}.") from error
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{path} names {sorted(map(str, names))[:3]}; expected files of the folder itself.")
    return weight_map


def share_files(folder: str | Path, pattern: str) -> None:
    """Set files to the mode that the umask gives new ones; safetensors makes its own readable by the owner alone."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        probe = Path(scratch) / "probe"
        probe.touch()
        mode = probe.stat().st_mode & 0o777
    for path in Path(folder).glob(pattern):
        path.chmod(mode)
