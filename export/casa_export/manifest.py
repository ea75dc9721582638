"""`manifest.json`: what an exported folder holds, so that a runtime in any language can load and check it.

format_version   raised when a reader must change; readers reject a newer one
model            fusion, backbone, dtype, opset, stop tokens
source           name and hash of the checkpoint
limits, axes     largest sizes; smallest and largest size of every named axis of each graph
graphs           each graph's file and its inputs and outputs: name, dtype, axes
files            SHA-256 and size of every file
versions         what made it
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from casa_engine.atomic_files import file_hash, write_atomically
from casa_export.errors import ExportError, ManifestError
from casa_export.graph_spec import GraphSpec, TensorSpec
from casa_export.json_fields import FAULTS, expect, read_object
from casa_export.limits import Limits

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`; see the module for the fields."""

    model: dict[str, Any]
    source: dict[str, str]
    limits: Limits
    axes: dict[str, dict[str, tuple[int, int]]]
    graphs: dict[str, GraphSpec]
    versions: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write it, with hashes of all files that the folder holds now."""
        paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != FILE_NAME)
        files = {path.name: {"sha256": file_hash(path), "size_bytes": path.stat().st_size} for path in paths}
        content = asdict(self) | {"files": files}
        for name, graph in content["graphs"].items():
            graph["file"] = graph_file(name)
        write_atomically(folder / FILE_NAME, (json.dumps(content, indent=2) + "\n").encode())


def graph_file(name: str) -> str:
    """Return the file of a graph; weights over 2 GB are beside it, under the same name with `.data`."""
    return f"{name}.onnx"


def folder_hash(folder: Path) -> str:
    """Return the SHA-256 over names and contents of a folder's files, in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(os.fsencode(f"{path.name} {file_hash(path)}\n"))
    return digest.hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        ManifestError: There is none, it cannot be read, or it is of a newer format.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise ManifestError(f"{folder} has no {FILE_NAME}; expected a folder that casa-export wrote.")
    try:
        content = read_object(path)
        version = expect(content["format_version"], int, "format_version")
    except FAULTS as error:
        raise ManifestError(f"{path} is not a manifest of casa-export: {error}. Export the model again.") from error
    if version > FORMAT_VERSION:
        raise ManifestError(
            f"{path} has format version {version}; this casa-export reads up to {FORMAT_VERSION}. Update casa-engine, "
            "or export the checkpoint again with this version."
        )
    try:
        manifest = _from_json(content)
    except (*FAULTS, ExportError) as error:
        raise ManifestError(f"{path} lacks or misnames a field: {error}. Export the model again.") from error
    missing = [graph for graph in manifest.graphs if graph_file(graph) not in manifest.files]
    if missing or not manifest.graphs:
        raise ManifestError(f"{path} lists no file of graph {', '.join(missing) or 'at all'}. Export the model again.")
    return manifest


def graph_hashes(manifest: Manifest, graph: str) -> dict[str, str]:
    """Return the SHA-256 of a graph's file and of the weights beside it, by name."""
    file = graph_file(graph)
    return {name: entry["sha256"] for name, entry in manifest.files.items() if name.startswith(file)}


def check_files(folder: str | Path, manifest: Manifest, names: list[str] | None = None) -> None:
    """Check files against their hashes.

    Args:
        folder: The exported folder.
        manifest: Its manifest.
        names: Which files; None for all.

    Raises:
        ManifestError: A file is missing or differs.
    """
    for name, known in manifest.files.items():
        if names is not None and name not in names:
            continue
        path = Path(folder) / name
        if Path(name).name != name:
            raise ManifestError(f"{FILE_NAME} lists {name!r}, which is not in {folder}. Export the model again.")
        if not path.is_file():
            raise ManifestError(f"{path} is missing; the manifest lists it. Copy the whole folder, or export again.")
        if path.stat().st_size != known["size_bytes"] or file_hash(path) != known["sha256"]:
            raise ManifestError(
                f"{path} is damaged: its contents do not match the hash in {FILE_NAME}. Copy it again, or export the "
                "model again."
            )


def _from_json(content: dict[str, Any]) -> Manifest:
    model = expect(content["model"], dict, "model")
    expect(model["dtype"], str, "dtype")
    return Manifest(
        model=model,
        source=expect(content["source"], dict, "source"),
        limits=Limits(**{name: expect(value, int, name) for name, value in content["limits"].items()}),
        axes={
            graph: {name: _range(sizes, name) for name, sizes in ranges.items()}
            for graph, ranges in content["axes"].items()
        },
        graphs={
            name: GraphSpec(name, *map(_tensors, (g["inputs"], g["outputs"]))) for name, g in content["graphs"].items()
        },
        versions=expect(content["versions"], dict, "versions"),
        files={
            name: {
                "sha256": expect(entry["sha256"], str, "sha256"),
                "size_bytes": expect(entry["size_bytes"], int, "size_bytes"),
            }
            for name, entry in content["files"].items()
        },
        format_version=content["format_version"],
    )


def _range(sizes: list[int], name: str) -> tuple[int, int]:
    smallest, largest = sizes
    return expect(smallest, int, name), expect(largest, int, name)


def _tensors(entries: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(expect(entry["name"], str, "name"), expect(entry["dtype"], str, "dtype"), tuple(entry["axes"]))
        for entry in expect(entries, list, "tensors")
    )
