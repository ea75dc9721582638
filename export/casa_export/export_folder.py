"""The user's folder of an export: which of its files are ours, and how a new export takes the place of an older one."""

from pathlib import Path

from casa_engine.staged_folder import StagedFolder, check_apart
from casa_export.errors import ExportError, ManifestError
from casa_export.manifest import FILE_NAME, read_manifest
from casa_export.trt_manifest import FOLDER_NAME, engine_files


def stage_export(source: Path, folder: Path, needed_bytes: int) -> StagedFolder:
    """Return a staged folder that becomes the export at `folder` when it is committed.

    Args:
        source: The checkpoint's folder.
        folder: Where the export belongs.
        needed_bytes: Of free space, at least.

    Raises:
        OutputError: One of the two folders is within the other.
    """
    check_apart(folder, source)
    return StagedFolder(folder, FILE_NAME, owned_files, needed_bytes)


def owned_files(folder: Path) -> frozenset[str]:
    """Return the relative paths of all files that the folder's own manifests list.

    Raises:
        ExportError: It is no export: its files are not ours to replace.
    """
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        raise ExportError(
            f"{folder} holds files that casa-export did not write ({error}) Name a new or empty folder."
        ) from error
    engines = {f"{FOLDER_NAME}/{name}" for name in engine_files(folder / FOLDER_NAME)}
    return frozenset({FILE_NAME, *manifest.files} | engines)
