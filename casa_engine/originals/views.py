"""Loads originals in place: a small view folder stands for one, with links to its weights and no copy of them.

A file `casa.map` in the original's folder is its map file: everything that opens the folder reads it.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from casa_engine.atomic_files import write_atomically
from casa_engine.configuration import CasaConfig
from casa_engine.errors import CheckpointError, OutputError
from casa_engine.json_files import read_object
from casa_engine.originals.converting import write_small_files
from casa_engine.originals.map_file import read_maps
from casa_engine.originals.plan import Plan, make_plan
from casa_engine.originals.snapshot import CONFIG, read_snapshot
from casa_engine.tensor_map import MAP_FILE
from casa_engine.view_folder import view_root
from casa_engine.weight_files import INDEX

LOGGER = logging.getLogger(__name__)
OWN_MAP = "casa.map"
# In the model types of published models.
NAMES = ("casa", "helium1")
# Raised when the files of a view change.
VIEW_FORMAT = "1"


def resolve_checkpoint(folder: str | Path) -> Path:
    """Returns the folder to load: a view of it where it is an original, otherwise itself.

    Raises:
        CheckpointError: It is an original and fits no family.
        OutputError: The view cannot be written.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file() or not _is_original(read_object(path), folder / OWN_MAP):
        return folder
    maps = [folder / OWN_MAP] if (folder / OWN_MAP).is_file() else []
    plan = make_plan(read_snapshot(folder), read_maps(maps))
    plan.check()
    LOGGER.warning(
        "%s is a published checkpoint, loaded in place. What it does not say was chosen: %s. "
        "`casa checkpoint inspect` explains each.",
        folder,
        ", ".join(f"{value.name} = {value.value}" for value in plan.open_values) or "nothing",
    )
    view = view_root() / _key(plan)
    if not (view / CONFIG).is_file():
        try:
            _write_view(plan, view)
        except OSError as error:
            raise OutputError(
                f"{view.parent} cannot hold what {folder} is loaded by: {error.strerror or error}. Set XDG_CACHE_HOME "
                "to a folder that can be written, or convert the checkpoint."
            ) from error
    return view


def _is_original(config: dict, own_map: Path) -> bool:
    """Whether a folder that is not in the engine's form calls itself a published model, or somebody has mapped it."""
    kind = config.get("model_type")
    return kind != CasaConfig.model_type and (own_map.is_file() or any(word in str(kind).lower() for word in NAMES))


def _key(plan: Plan) -> str:
    """Name of a view: another one for other weights, another place, or another reading of the same."""
    snapshot = plan.snapshot
    parts = [VIEW_FORMAT, snapshot.fingerprint, os.path.realpath(snapshot.path), repr(list(plan.values.values()))]
    parts += [json.dumps(plan.assignment.tensor_map.as_json()), plan.config.to_json_string()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _write_view(plan: Plan, view: Path) -> None:
    view.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=view.parent, prefix=".new-"))
    try:
        for file in {header.file for header in plan.snapshot.tensors.values()}:
            (new / file).symlink_to(os.path.realpath(plan.snapshot.path / file))
        if (plan.snapshot.path / INDEX).is_file():
            shutil.copyfile(plan.snapshot.path / INDEX, new / INDEX)
        write_small_files(plan, new, {})
        write_atomically(new / MAP_FILE, json.dumps(plan.assignment.tensor_map.as_json(), indent=0).encode())
        with suppress(FileExistsError):  # another process was faster: it wrote the same
            new.rename(view)
    finally:
        if new.exists():
            shutil.rmtree(new)
    if not (view / CONFIG).is_file():
        raise CheckpointError(f"{view} is not a view of ours. Remove it.")
