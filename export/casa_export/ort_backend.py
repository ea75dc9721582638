"""ONNX Runtime behind `Backend`: sessions of the three graphs, caches as OrtValues bound from step to step."""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from casa_export.errors import ManifestError, RunnerError
from casa_export.manifest import Manifest, graph_file, graph_hashes
from casa_export.ort_threads import choose_threads, session_options

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# ONNX's numbers for element types: NumPy has none for bfloat16.
ELEMENT_TYPES = {"fp32": 1, "fp16": 10, "bf16": 16}


class OrtBackend:
    """Runs exported graphs with ONNX Runtime.

    A decoder step's caches are outputs that ONNX Runtime allocates on the device and that the next step binds as
    inputs: they are never copied to Python or between devices. (Within a step the graph appends the new tokens, as
    ONNX's functional form demands.)

    Args:
        folder: The exported folder.
        manifest: Its manifest.
        device: `cpu` or `cuda`.
        num_threads: Threads within an operation; 0 chooses by the size of the graphs (`ort_threads`).
        optimize: Whether ONNX Runtime rewrites the graphs for this machine when it loads them.

    Raises:
        RunnerError: This ONNX Runtime lacks the provider, or no kernel for the dtype.
        ManifestError: A graph does not load.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, device: str = "cpu", num_threads: int = 0, optimize: bool = True
    ) -> None:
        if device not in PROVIDERS:
            raise RunnerError(f"device is {device!r}; expected one of {', '.join(PROVIDERS)}.")
        if PROVIDERS[device] not in ort.get_available_providers():
            raise RunnerError(
                f"this ONNX Runtime has no {PROVIDERS[device]}; it has {', '.join(ort.get_available_providers())}. "
                "Use device 'cpu', or install onnxruntime-gpu on a machine with an NVIDIA GPU."
            )
        self.device, self.manifest = device, manifest
        graph_bytes = sum(
            manifest.files[name]["size_bytes"] for g in manifest.graphs for name in graph_hashes(manifest, g)
        )
        options = session_options(num_threads or choose_threads(graph_bytes))
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3  # its warnings are about where it places shape arithmetic
        self.sessions = {
            name: _load(folder / graph_file(name), manifest.model["dtype"], device, options) for name in manifest.graphs
        }
        self._outputs = {name: [tensor.name for tensor in graph.outputs] for name, graph in manifest.graphs.items()}

    def run(
        self, graph: str, host: dict[str, np.ndarray], resident: dict[str, ort.OrtValue], fetch: str | None
    ) -> tuple[np.ndarray | None, dict[str, ort.OrtValue]]:
        """Run a graph; see `Backend.run`."""
        session = self.sessions[graph]
        binding = session.io_binding()
        for name, array in host.items():
            binding.bind_cpu_input(name, array)
        for name, value in resident.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs[graph]:
            binding.bind_output(name, "cpu" if name == fetch else self.device)
        session.run_with_iobinding(binding)
        values = dict(zip(self._outputs[graph], binding.get_outputs(), strict=True))
        fetched = values.pop(fetch).numpy() if fetch else None
        return fetched, values

    def empty(self, shape: tuple[int, ...]) -> ort.OrtValue:
        """Return an empty cache; see `Backend.empty`."""
        return ort.OrtValue.ortvalue_from_shape_and_type(
            list(shape), ELEMENT_TYPES[self.manifest.model["dtype"]], self.device, 0
        )


def _load(path: Path, dtype: str, device: str, options: ort.SessionOptions) -> ort.InferenceSession:
    # The CPU provider takes what another one has no kernel for.
    providers = [PROVIDERS[device]] + ([PROVIDERS["cpu"]] if device != "cpu" else [])
    try:
        return ort.InferenceSession(path, options, providers=providers)
    except ort.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise RunnerError(
            f"ONNX Runtime has no {device} kernel for {dtype} in {path.name}: {error}. "
            "Export with --dtype fp32 or fp16."
        ) from error
    except (
        ort.capi.onnxruntime_pybind11_state.Fail,
        ort.capi.onnxruntime_pybind11_state.InvalidProtobuf,
        ort.capi.onnxruntime_pybind11_state.InvalidGraph,
        ort.capi.onnxruntime_pybind11_state.NoSuchFile,
    ) as error:
        raise ManifestError(f"ONNX Runtime cannot load {path}: {error}. Export the model again.") from error
