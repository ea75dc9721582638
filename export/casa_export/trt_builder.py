"""ONNX graphs -> TensorRT engines, with either TensorRT package, without a GPU where the package can."""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from casa_engine.atomic_files import file_hash
from casa_engine.staged_folder import StagedFolder
from casa_export.engine_cache import EngineCache
from casa_export.errors import ExportError, ManifestError, RunnerError
from casa_export.manifest import Manifest, check_files, graph_file, graph_hashes, read_manifest
from casa_export.progress import Progress
from casa_export.trt_manifest import FILE_NAME, FOLDER_NAME, Engine, EngineManifest, engine_files, read_engine_manifest
from casa_export.trt_package import CollectingLogger, load_tensorrt
from casa_export.trt_profiles import Profile, build_profiles


def engine_targets(package: str, compute_capabilities: tuple[str, ...] = ()) -> tuple[ModuleType, list[Any]]:
    """Check that engines can be built here.

    Args:
        package: `tensorrt`, `tensorrt_rtx` or `auto`.
        compute_capabilities: TensorRT-RTX only: GPUs to build for, such as `8.9`; empty for its default set.

    Returns:
        The package, and its own names of the compute capabilities.

    Raises:
        RunnerError: TensorRT is missing, or cannot build for what was asked.
    """
    trt = load_tensorrt(package)
    targets = _targets(trt, compute_capabilities)
    _builder(trt, CollectingLogger(trt))
    return trt, targets


def build_engines(
    folder: str | Path,
    package: str = "auto",
    compute_capabilities: tuple[str, ...] = (),
    engine_cache: Path | None = None,
    progress: Progress | None = None,
    earlier: Path | None = None,
) -> EngineManifest:
    """Build engines of all graphs into the folder's `engines/`, as one transaction.

    An engine whose key (graph file, TensorRT version, compute capabilities, profiles) did not change is kept.

    Args:
        folder: What `casa-export` wrote.
        package: `tensorrt`, `tensorrt_rtx` or `auto`.
        compute_capabilities: TensorRT-RTX only: GPUs to build for, such as `8.9`; empty for its default set.
        engine_cache: A folder to share built engines between exports, in files named by key.
        progress: Reports every step; silent by default.
        earlier: An older export whose engines may be used again; `folder` itself where not given.

    Raises:
        RunnerError: TensorRT is missing, or cannot build for what was asked.
        ManifestError: The folder is no whole export.
        ExportError: TensorRT rejects a graph; the message has TensorRT's own.
        OutputError: Engines or cache cannot be written.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    trt, targets = engine_targets(package, compute_capabilities)
    cache = EngineCache(engine_cache) if engine_cache else None
    known = _known_engines((earlier or folder) / FOLDER_NAME)
    progress = progress or Progress(len(manifest.graphs), None)
    engines = {}
    with StagedFolder(folder / FOLDER_NAME, FILE_NAME, engine_files) as staged:
        for graph in manifest.graphs:
            shapes = build_profiles(manifest, graph)
            key = _key(trt, manifest, graph, compute_capabilities, shapes)
            path = staged.path / f"{graph}.engine"
            with progress.step(f"{trt.__name__}: build {graph}"):
                found = known.get(key) or (cache and cache.find(key))
                if found:
                    shutil.copyfile(found, path)
                else:
                    path.write_bytes(build_engine(trt, folder / graph_file(graph), shapes, targets))
                if cache and not (found and found.parent == cache.folder):
                    cache.add(key, path)
            engines[graph] = Engine(path.name, key, file_hash(path), graph_hashes(manifest, graph), tuple(shapes))
        built = EngineManifest(trt.__name__, trt.__version__, tuple(compute_capabilities), engines)
        built.write(staged.path)
        staged.commit()
    return built


def _known_engines(folder: Path) -> dict[str, Path]:
    """Return the undamaged engines of an engine folder, by key."""
    try:
        engines = read_engine_manifest(folder).engines.values()
    except ManifestError:
        return {}
    paths = {engine.key: (folder / engine.file, engine.sha256) for engine in engines}
    return {key: path for key, (path, known) in paths.items() if path.is_file() and file_hash(path) == known}


def build_engine(trt: ModuleType, onnx: Path, shapes: list[Profile], targets: list[Any]) -> memoryview:
    """Parse a graph and build its engine.

    Args:
        trt: The TensorRT package.
        onnx: The graph.
        shapes: Its optimisation profiles.
        targets: TensorRT-RTX's compute capabilities to build for; empty for the default.

    Returns:
        The serialised engine.
    """
    logger = CollectingLogger(trt)
    builder = _builder(trt, logger)
    # Strongly typed: every tensor has the dtype that the graph gives it. Newer versions support nothing else.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise ExportError(f"{trt.__name__} {trt.__version__} cannot read {onnx.name}: {errors}")
    config = builder.create_builder_config()
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(target, index)
    for shape in shapes:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in shape.shapes.items():
            profile.set_shape(name, low, usual, high)
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(f"{trt.__name__} refuses profile {shape.name!r} of {onnx.name}: {_words(logger)}")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(f"{trt.__name__} {trt.__version__} cannot build {onnx.name}: {_words(logger)}")
    return memoryview(engine)


def _builder(trt: ModuleType, logger: Any) -> Any:
    builder = trt.Builder(logger)
    if builder is None:
        raise RunnerError(f"{trt.__name__} has no builder here: {_words(logger)}. Build on a machine with a GPU.")
    return builder


def _targets(trt: ModuleType, compute_capabilities: tuple[str, ...]) -> list[Any]:
    """Return TensorRT-RTX's names of compute capabilities such as `8.9`."""
    if not compute_capabilities:
        return []
    if not hasattr(trt, "ComputeCapability"):
        raise RunnerError(
            f"{trt.__name__} builds for the GPU of this machine only; leave --compute-capability out, or use "
            "--trt tensorrt_rtx."
        )
    known = {name: value for name, value in vars(trt.ComputeCapability).items() if name.startswith("SM")}
    names = {f"{name[2:-1]}.{name[-1]}": value for name, value in known.items()}
    for capability in compute_capabilities:
        if capability not in names:
            raise RunnerError(
                f"compute capability is {capability!r}; {trt.__name__} {trt.__version__} builds for "
                f"{', '.join(sorted(names, key=float))}. For other GPUs build on them with --trt tensorrt."
            )
    return [names[capability] for capability in compute_capabilities]


def _key(
    trt: ModuleType, manifest: Manifest, graph: str, compute_capabilities: tuple[str, ...], shapes: list[Profile]
) -> str:
    parts = [
        trt.__name__,
        trt.__version__,
        list(compute_capabilities),
        graph_hashes(manifest, graph),
        [asdict(shape) for shape in shapes],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _words(logger: Any) -> str:
    return "; ".join(logger.errors) or "it gives no reason"
