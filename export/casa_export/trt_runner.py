"""TensorRT behind `Backend`: engines on an NVIDIA GPU, caches as CUDA tensors that stay there.

Not run on a GPU yet (docs/export.md lists what was checked): engines are built and errors tested without one.
"""

import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from casa_engine.checkpoints import read_config
from casa_export.errors import RunnerError
from casa_export.exported_model import ExportedModel
from casa_export.graph_spec import axis_size
from casa_export.manifest import Manifest, check_files, read_manifest
from casa_export.trt_manifest import FOLDER_NAME, EngineManifest, read_engine_manifest
from casa_export.trt_package import CollectingLogger, load_tensorrt
from casa_export.trt_profiles import Profile


class TrtBackend:
    """Runs TensorRT engines.

    Args:
        folder: The exported folder, with its engines.
        manifest: Its manifest.
        engines: Manifest of its engines.

    Raises:
        RunnerError: No GPU, no TensorRT, or one that the engines were not built for.
        ManifestError: An engine is missing, damaged or of other graphs.
    """

    def __init__(self, folder: Path, manifest: Manifest, engines: EngineManifest) -> None:
        engines.check_graphs(manifest)
        trt = load_tensorrt(engines.package)
        if not torch.cuda.is_available():
            raise RunnerError(
                "TensorRT engines need an NVIDIA GPU, and torch sees none here. Run the ONNX graphs instead "
                "(casa-export run FOLDER --device cpu)."
            )
        engines.check_runtime(trt.__version__, ".".join(map(str, torch.cuda.get_device_capability())))
        self.manifest, self.engines = manifest, engines
        self._lock = threading.Lock()  # execution contexts hold shapes and addresses, so they serve one call at a time
        self._logger = CollectingLogger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engines, self._contexts = {}, {}
        for graph in manifest.graphs:
            path = engines.check_file(folder / FOLDER_NAME, graph)
            engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if engine is None:
                raise RunnerError(f"TensorRT cannot load {path}: {'; '.join(self._logger.errors)}. Build it again.")
            self._engines[graph] = engine

    def run(
        self, graph: str, host: dict[str, np.ndarray], resident: dict[str, Tensor], fetch: str | None
    ) -> tuple[np.ndarray | None, dict[str, Tensor]]:
        """Run a graph; see `Backend.run`."""
        inputs = {name: torch.from_numpy(array).cuda() for name, array in host.items()} | resident
        with self._lock:
            outputs = self._execute(graph, inputs)
        fetched = outputs.pop(fetch).cpu().numpy() if fetch else None
        return fetched, outputs

    def _execute(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        index, profile = self._profile(graph, inputs)
        context = self._context(graph, index)
        for name, tensor in inputs.items():
            profile.check(graph, name, tuple(tensor.shape))
            context.set_input_shape(name, tuple(tensor.shape))
        outputs = self._outputs(graph, inputs)
        # TensorRT requires an address even for a tensor without elements.
        spare = torch.empty(1, device="cuda")
        for name, tensor in (inputs | outputs).items():
            context.set_tensor_address(name, tensor.data_ptr() if tensor.numel() else spare.data_ptr())
        stream = torch.cuda.current_stream()
        if not context.execute_async_v3(stream.cuda_stream):
            raise RunnerError(f"TensorRT failed in graph {graph}: {'; '.join(self._logger.errors)}")
        stream.synchronize()
        return outputs

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Return an empty cache; see `Backend.empty`."""
        dtype = getattr(torch, self.manifest.graphs["image_kv"].outputs[0].dtype)
        return torch.empty(shape, dtype=dtype, device="cuda")

    def _profile(self, graph: str, inputs: dict[str, Tensor]) -> tuple[int, Profile]:
        """Return decode's profile for one token a row, else the first."""
        known = self.engines.engines[graph].profiles
        decode = graph == "decoder" and inputs["input_ids"].shape[1] == 1
        index = next(i for i, profile in enumerate(known) if (profile.name == "decode") == decode)
        return index, known[index]

    def _context(self, graph: str, index: int):
        if (graph, index) not in self._contexts:
            context = self._engines[graph].create_execution_context()
            context.set_optimization_profile_async(index, torch.cuda.current_stream().cuda_stream)
            self._contexts[graph, index] = context
        return self._contexts[graph, index]

    def _outputs(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Allocate the outputs, whose sizes follow from those of the inputs' named axes."""
        spec = self.manifest.graphs[graph]
        sizes: dict[str, int] = {}
        for tensor in spec.inputs:
            for axis, size in zip(tensor.axes, inputs[tensor.name].shape, strict=True):
                if isinstance(axis, str) and "*" not in axis:
                    sizes[axis] = size
        return {
            tensor.name: torch.empty(
                [axis_size(axis, sizes) for axis in tensor.axes], dtype=getattr(torch, tensor.dtype), device="cuda"
            )
            for tensor in spec.outputs
        }


def load_trt_model(folder: str | Path) -> ExportedModel:
    """Load an exported model that runs on its TensorRT engines; same interface as `ExportedModel.load`.

    Raises:
        ManifestError: Folder or engines are missing or damaged.
        RunnerError: This machine cannot run them.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    backend = TrtBackend(folder, manifest, read_engine_manifest(folder / FOLDER_NAME))
    return ExportedModel(read_config(folder), manifest, GenerationConfig.from_pretrained(folder), backend)
