"""The user's folder of a checkpoint: `written_files.json` lists what casa-engine wrote, and only that is ever replaced.

A file that was changed since, such as weights that somebody trained on, is not in the list any more: its hash differs.
"""

import json
from pathlib import Path

from casa_engine.atomic_files import file_hash, write_atomically
from casa_engine.errors import OutputError
from casa_engine.staged_folder import StagedFolder

LIST_FILE = "written_files.json"
LAST_FILE = "config.json"  # no loader takes a folder without it
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def stage_checkpoint(folder: str | Path, needed_bytes: int = 0) -> StagedFolder:
    """A staged folder that becomes the checkpoint at `folder` when it is listed and committed.

    Args:
        folder: Where the checkpoint belongs.
        needed_bytes: Of free space, at least.
    """
    return StagedFolder(folder, LAST_FILE, owned_files, needed_bytes)


def list_files(folder: Path) -> None:
    """Write the list of all that the folder holds now."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != LIST_FILE)
    content = {"files": {path.name: file_hash(path) for path in paths}}
    write_atomically(folder / LIST_FILE, (json.dumps(content, indent=2) + "\n").encode())


def owned_files(folder: Path) -> frozenset[str]:
    """Files of the list, as they were written.

    Raises:
        OutputError: There are weights that are not among them: a loader would read them with the new ones.
    """
    owned = {name for name, known in _listed(folder).items() if _is_unchanged(folder, name, known)}
    others = sorted(path.name for pattern in WEIGHTS for path in folder.glob(pattern) if path.name not in owned)
    if others:
        raise OutputError(
            f"{folder} holds {others[0]}, which casa-engine did not write, or which was changed since. Name another "
            "folder, or move it elsewhere."
        )
    return frozenset(owned | {LIST_FILE}) if owned else frozenset()


def _listed(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / LIST_FILE).read_bytes())["files"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return {}  # nothing is ours then


def _is_unchanged(folder: Path, name: str, known: str) -> bool:
    path = folder / name
    return Path(name).name == name and path.is_file() and file_hash(path) == known
