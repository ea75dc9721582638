"""Loads originals in place: a small view folder stands for one, with links to its weights and no copy of them.

A file `casa.map` in the original's folder is its map file: everything that opens the folder reads it.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from casa_engine.atomic_files import write_atomically
from casa_engine.configuration import CasaConfig
from casa_engine.errors import CasaError, OutputError
from casa_engine.json_files import read_object
from casa_engine.originals.converting import ORIGIN_FILE, write_small_files
from casa_engine.originals.map_file import read_maps
from casa_engine.originals.plan import Plan, make_plan
from casa_engine.originals.snapshot import CONFIG, GENERATION, TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, read_snapshot
from casa_engine.staged_folder import find_os_error
from casa_engine.tensor_map import MAP_FILE
from casa_engine.view_folder import has_trusted_owner, view_root
from casa_engine.weight_files import INDEX

LOGGER = logging.getLogger(__name__)
OWN_MAP = "casa.map"
# In the model types of published models.
NAMES = ("casa", "helium1")
# Of one list in the warning, in characters.
MAX_LINE = 4000
# Raised when the files of a view change.
VIEW_FORMAT = "1"
FILES = (CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, "processor_config.json", ORIGIN_FILE, MAP_FILE)
# Name of a view that is being written, and the age from which one that nobody finished is removed.
UNFINISHED, LEFTOVER_S = ".new-", 24 * 3600


def resolve_checkpoint(folder: str | Path) -> Path:
    """Return the folder to load: a view of it where it is an original, otherwise itself.

    Raises:
        CheckpointError: It is an original and fits no family.
        OutputError: The view cannot be written, or is somebody else's.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file() or not _is_original(read_object(path), folder / OWN_MAP):
        return folder
    maps = [folder / OWN_MAP] if (folder / OWN_MAP).is_file() else []
    plan = make_plan(read_snapshot(folder), read_maps(maps))
    plan.check()
    LOGGER.warning(
        "%s is a published checkpoint, loaded in place. What it does not say was chosen: %s. Not verified: %s; names "
        "of %d of %d tensors. Fields that nothing reads: %s. Map file: %s. `casa checkpoint inspect` explains each.",
        folder,
        _listed(f"{value.name} = {value.value}" for value in plan.open_values),
        _listed(f"{value.name} = {value.value}" for value in plan.unverified_values),
        len(plan.unverified_tensors),
        len(plan.snapshot.tensors),
        _listed(path for path, _ in plan.unread),
        _listed(map(str, plan.maps)),
    )
    view = view_root() / _key(plan)
    try:
        if not _is_complete(plan, view):
            _write_view(plan, view)
        is_trusted = has_trusted_owner(view)
    except CasaError:
        raise
    except Exception as error:  # libraries in Rust describe a full disk in exceptions of their own
        cause = find_os_error(error)
        if cause is None:
            raise
        raise OutputError(
            f"{view.parent} cannot hold what {folder} is loaded by: {cause.strerror or cause}. Set XDG_CACHE_HOME "
            "to a folder that can be written, or convert the checkpoint."
        ) from error
    if not is_trusted:
        raise OutputError(
            f"{view} is another user's, who could have written anything into it. Set XDG_CACHE_HOME to a folder of "
            "your own, or convert the checkpoint."
        )
    return view


def _listed(texts: Iterable[str]) -> str:
    """Texts of a stranger's file in one line that a terminal can show."""
    line = ", ".join(texts) or "none"
    line = line if line.isprintable() else repr(line)
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..."


def _is_original(config: dict, own_map: Path) -> bool:
    """Whether a folder that is not in the engine's form calls itself a published model, or somebody has mapped it."""
    kind = config.get("model_type")
    return kind != CasaConfig.model_type and (own_map.is_file() or any(word in str(kind).lower() for word in NAMES))


def _key(plan: Plan) -> str:
    """Name of a view: another one for other files, another place, or another reading of the same."""
    snapshot = plan.snapshot
    engine = ""
    with suppress(PackageNotFoundError):  # a bare folder of the package
        engine = version("casa-engine")
    parts = [
        VIEW_FORMAT,
        engine,
        snapshot.fingerprint,
        os.path.realpath(snapshot.path),
        repr(list(plan.values.values())),
    ]
    parts += [json.dumps(plan.assignment.tensor_map.as_json()), plan.config.to_json_string()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _is_complete(plan: Plan, view: Path) -> bool:
    """Whether a view is there with all of its files: programs that clean a cache take them one by one."""
    return all((view / file).is_file() for file in {*FILES, *_weight_files(plan)})


def _weight_files(plan: Plan) -> set[str]:
    return {header.file for header in plan.snapshot.tensors.values()}


def _write_view(plan: Plan, view: Path) -> None:
    view.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(view.parent)
    new, old = (Path(tempfile.mkdtemp(dir=view.parent, prefix=UNFINISHED)) for _ in range(2))
    try:
        for file in _weight_files(plan):
            (new / file).symlink_to(os.path.realpath(plan.snapshot.path / file))
        if (plan.snapshot.path / INDEX).is_file():
            shutil.copyfile(plan.snapshot.path / INDEX, new / INDEX)
        write_small_files(plan, new, {})
        write_atomically(new / MAP_FILE, json.dumps(plan.assignment.tensor_map.as_json(), indent=0).encode())
        if not _move(new, view) and not _is_complete(plan, view):  # an older one, of which files were removed
            view.rename(old)
            _move(new, view)
    finally:
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)


def _move(new: Path, view: Path) -> bool:
    """Put a new view in its place; False where one is there: another process was faster, and wrote the same."""
    try:
        new.rename(view)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True


def _remove_leftovers(root: Path) -> None:
    """Remove what processes left that were killed while they wrote."""
    for path in root.glob(f"{UNFINISHED}*"):
        with suppress(FileNotFoundError):  # another process removed it
            if time.time() - path.lstat().st_mtime > LEFTOVER_S:
                shutil.rmtree(path, ignore_errors=True)
