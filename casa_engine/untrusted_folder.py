"""What a checkpoint folder may hold: checked before any library reads it, so that nothing of it is ever executed.

A folder from elsewhere may name Python for transformers to import (`auto_map`), weights that are programs (pickles),
other repositories to fetch, and links out of itself. Each is refused with one sentence.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from casa_engine.errors import CheckpointError
from casa_engine.json_files import read_object
from casa_engine.view_folder import is_view

MAX_FILES = 10_000
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
# What some loader reads; what else lies in a folder, such as a user's own files, is nobody's business.
READ_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".map")
READ_FOLDERS = ("additional_chat_templates",)
ADAPTER = "adapter_config.json"
CONFIGS = ("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json")
CONFIGS += ("video_preprocessor_config.json", "tokenizer_config.json", "chat_template.json")
# Fields whose value transformers may look up on a hub and import or compile.
LOOKED_UP = re.compile(r"^_?(attn|experts|kernels?|linear)_?(implementation|config)(_internal|_autoset)?$")
# Fields that name another configuration or other weights.
REDIRECTS = ("configuration_files", "transformers_weights")


def check_folder(folder: Path) -> None:
    """Check a checkpoint in this engine's own form: files and configurations.

    Raises:
        CheckpointError: As `check_files` and `check_no_code`.
    """
    check_files(folder)
    check_no_code(folder)


def check_files(folder: Path) -> None:
    """Check the files of a folder by their names.

    Raises:
        CheckpointError: There are too many, pickles, links in the place of what is read that lead out of the folder,
            or an adapter, which would have transformers load another model.
    """
    names = sorted(entry.name for entry in os.scandir(folder))
    if len(names) > MAX_FILES:
        raise CheckpointError(f"{folder} has {len(names)} files; expected a checkpoint's own, at most {MAX_FILES}.")
    for name in names:
        path = folder / name
        if name.lower().endswith(PICKLES):
            raise CheckpointError(
                f"{folder} has {name}: such files are programs that run when they are read. Remove it; weights are "
                "read from *.safetensors."
            )
        if name == ADAPTER:
            raise CheckpointError(
                f"{folder} has {ADAPTER}: an adapter names another model to load. Merge it into the weights first."
            )
        if name.lower().endswith(READ_SUFFIXES) or name in READ_FOLDERS:
            check_link(folder, path)


def check_link(folder: Path, path: Path) -> None:
    """Raise CheckpointError if a file of the folder is a symbolic link that leads out of it."""
    if path.is_symlink() and not _stays(folder, path):
        raise CheckpointError(
            f"{path} is a symbolic link to {os.readlink(path)}, outside of the folder. Copy the file itself; only "
            "links of the hub's cache, from snapshots/ to its own blobs/, are followed."
        )


def check_no_code(folder: Path) -> None:
    """Check the configurations of a checkpoint in this engine's own form, which never names code.

    Raises:
        CheckpointError: One names code, or something to be looked up elsewhere.
    """
    for name in CONFIGS:
        if (folder / name).is_file():
            for field, value in fields_of(read_object(folder / name)):
                if field == "auto_map":
                    raise CheckpointError(
                        f"{folder / name} has auto_map, which names Python files for transformers to run; expected a "
                        "checkpoint without code. Remove the field: casa-engine has its own code for the model."
                    )
                check_reference(folder / name, field, value)


def check_reference(path: Path, field: str, value: Any) -> None:
    """Raise CheckpointError if a configuration's field has transformers read another file, or fetch code."""
    if field in REDIRECTS:
        raise CheckpointError(
            f"{path} has {field}, by which transformers reads another file instead. Remove the field."
        )
    # Also within "wrapper|owner/kernel", and in an object with a value for each part of the model.
    if LOOKED_UP.match(field) and "/" in json.dumps(value):
        raise CheckpointError(
            f"{path} has {field} {value!r}, which transformers would fetch from a hub and run. Remove the field."
        )


def fields_of(document: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and value of every field of a JSON document, at any depth."""
    pending = [document]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            yield from ((str(name), value) for name, value in each.items())
            pending.extend(each.values())
        elif isinstance(each, list):
            pending.extend(each)


def _stays(folder: Path, path: Path) -> bool:
    """Whether a link leads to a file of the folder, or of the hub's cache that the folder is a part of."""
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if target.is_relative_to(home):
        return True
    if home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs":
        return True
    return is_view(home)
