"""`engines.json`: what a folder's TensorRT engines were built from, with and for."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from casa_engine.atomic_files import file_hash, write_atomically
from casa_export.errors import ManifestError, RunnerError
from casa_export.json_fields import FAULTS, expect, read_object
from casa_export.manifest import Manifest, graph_hashes
from casa_export.trt_profiles import Profile

FILE_NAME = "engines.json"
FOLDER_NAME = "engines"


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        file: Name in the engine folder.
        key: Hash of all that it was built from; equal keys mean an engine can be used again.
        sha256: Hash of the file.
        graph: SHA-256 of the graph's files that it was built from, by name.
        profiles: In the engine's order.
    """

    file: str
    key: str
    sha256: str
    graph: dict[str, str]
    profiles: tuple[Profile, ...]


@dataclass(frozen=True)
class EngineManifest:
    """Contents of `engines.json`.

    Attributes:
        package: `tensorrt` or `tensorrt_rtx`.
        version: Its version: an engine runs under exactly this one.
        compute_capabilities: GPUs it was built for, such as `8.9`; empty for the package's own default set.
        engines: By graph.
    """

    package: str
    version: str
    compute_capabilities: tuple[str, ...]
    engines: dict[str, Engine]

    def write(self, folder: Path) -> None:
        """Write it."""
        write_atomically(folder / FILE_NAME, (json.dumps(asdict(self), indent=2) + "\n").encode())

    def check_runtime(self, package_version: str, capability: str) -> None:
        """Check it against the TensorRT and the GPU of this machine.

        Args:
            package_version: Version of the installed package.
            capability: Compute capability of the GPU, such as `9.0`.

        Raises:
            RunnerError: They do not fit.
        """
        if package_version != self.version:
            raise RunnerError(
                f"the engines were built with {self.package} {self.version}; {package_version} is installed. Build "
                f"them again with casa-export --trt {self.package}, or install {self.version}."
            )
        if self.compute_capabilities and capability not in self.compute_capabilities:
            raise RunnerError(
                f"the engines were built for compute capability {', '.join(self.compute_capabilities)}; this GPU has "
                f"{capability}. Build them again with --compute-capability {capability}."
            )

    def check_graphs(self, manifest: Manifest) -> None:
        """Check it against the graphs of the folder.

        Raises:
            ManifestError: There is no engine of a graph, or it was built from another one.
        """
        for graph in manifest.graphs:
            if graph not in self.engines or self.engines[graph].graph != graph_hashes(manifest, graph):
                raise ManifestError(
                    f"the engine of {graph} was not built from the graph that is there now. Build the engines again "
                    "with casa-export --trt."
                )

    def check_file(self, folder: Path, graph: str) -> Path:
        """Return the path of a graph's engine after checking its hash.

        Raises:
            ManifestError: It is missing or damaged.
        """
        path = folder / self.engines[graph].file
        if not path.is_file() or file_hash(path) != self.engines[graph].sha256:
            raise ManifestError(f"{path} is missing or damaged (hash). Build the engines again with --trt.")
        return path


def read_engine_manifest(folder: str | Path) -> EngineManifest:
    """Read `engines.json` of an engine folder.

    Raises:
        ManifestError: It is missing or cannot be read.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise ManifestError(f"{folder} has no {FILE_NAME}; build the engines with casa-export --trt.")
    try:
        content = read_object(path)
        engines = {graph: _engine(entry) for graph, entry in content["engines"].items()}
        package, version = (expect(content[name], str, name) for name in ("package", "version"))
        return EngineManifest(package, version, tuple(content["compute_capabilities"]), engines)
    except FAULTS as error:
        raise ManifestError(f"{path} cannot be read: {error}. Build the engines again with --trt.") from error


def engine_files(folder: Path) -> frozenset[str]:
    """Return the names of our files in an engine folder: those that its `engines.json` lists, and itself."""
    try:
        return frozenset({FILE_NAME, *(engine.file for engine in read_engine_manifest(folder).engines.values())})
    except ManifestError:
        return frozenset()


def _engine(entry: dict) -> Engine:
    profiles = tuple(
        Profile(one["name"], {name: tuple(map(tuple, shapes)) for name, shapes in one["shapes"].items()})
        for one in entry["profiles"]
    )
    file, key, digest = (expect(entry[name], str, name) for name in ("file", "key", "sha256"))
    if Path(file).name != file:
        raise ValueError(f"file {file!r} is not in the folder")
    return Engine(file, key, digest, expect(entry["graph"], dict, "graph"), profiles)
