"""A checkpoint -> a folder of three ONNX graphs, tokenizer and processor files and a manifest."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from casa_engine.checkpoints import check_tensors, load_model, load_processor, read_config
from casa_engine.configuration import CasaConfig
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.processing_casa import CasaProcessor
from casa_export.errors import ExportError
from casa_export.graph_spec import GraphSpec, TensorSpec, axis_size, graph_specs
from casa_export.graphs import GRAPHS
from casa_export.limits import default_limits
from casa_export.manifest import FILE_NAME, Manifest, folder_hash, graph_file, read_manifest
from casa_export.progress import Progress

# TensorRT-RTX builds graphs of this opset as they are; from 23 on torch writes ONNX's Attention operator, which it
# builds only when told to take it apart again (docs/export.md, "Opset").
OPSET = 18
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VERSIONS = ("casa-engine", "torch", "transformers", "onnx", "onnxscript")
# Sizes to trace with: none is 0 or 1, which torch would take for constants.
TRACE_SIZES = {
    "batch": 2,
    "image_tokens": 6,
    "windows": 3,
    "window_slots": 4,
    "tokens": 5,
    "logits": 3,
    "past": 7,
    "window_past": 8,
}
NUM_STEPS = 3 + len(GRAPHS)


def export_checkpoint(
    source: str | Path,
    folder: str | Path,
    dtype: str = "fp32",
    limits: dict[str, int | None] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Exports a checkpoint.

    Args:
        source: The checkpoint's folder.
        folder: Where to write; an older export there is replaced.
        dtype: Of weights and caches: one of `DTYPES`.
        limits: Fields of `Limits`; None leaves one to its default.
        progress: Told of every step; silent by default.

    Returns:
        The manifest that was written.

    Raises:
        CheckpointError: The checkpoint is not as its configuration says.
        ExportError: Its fusion cannot be exported, or the target holds other files.
    """
    source, folder = Path(source), Path(folder)
    progress = progress or Progress(NUM_STEPS, None)
    config = read_config(source)
    check_exportable(config)
    _clear(folder)
    with progress.step(f"load {source.name} as {dtype}"):
        check_tensors(source, config)
        model = load_model(source, DTYPES[dtype])
        processor = load_processor(source)
    specs = graph_specs(config, str(DTYPES[dtype]).removeprefix("torch."))
    chosen = default_limits(config, _largest_image(processor), **(limits or {}))
    for name, spec in specs.items():
        with progress.step(f"export {name}"):
            export_graph(model, spec, folder / graph_file(name))
    with progress.step("write tokenizer, processor and configuration"):
        processor.save_pretrained(folder)
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    with progress.step("hash files and write the manifest"):
        Manifest(
            model=_describe(config, model, dtype),
            source={"name": source.name, "sha256": folder_hash(source)},
            limits=chosen,
            axes=chosen.axes(config),
            graphs=specs,
            versions={name: version(name) for name in VERSIONS},
        ).write(folder)
    return read_manifest(folder)


def check_exportable(config: CasaConfig) -> None:
    """Raises ExportError unless the configuration is one that the graphs can express."""
    if not config.is_cross_attention:
        raise ExportError(
            f"fusion {config.fusion!r} cannot be exported; expected 'ca' or 'ca_tv'. Token-insertion models are "
            "ordinary language models: export them with a general tool."
        )


def export_graph(model: CasaForConditionalGeneration, spec: GraphSpec, path: Path) -> None:
    """Writes one graph; weights over 2 GB as external data beside it."""
    dims = {name: Dim(name) for name in TRACE_SIZES}
    dynamic = tuple(
        {index: _dim(axis, dims) for index, axis in enumerate(tensor.axes) if isinstance(axis, str)}
        for tensor in spec.inputs
    )
    graph = GRAPHS[spec.name](model, spec).eval()
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            tuple(map(_example, spec.inputs)),
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            # A module that takes *inputs has one parameter for torch.
            dynamic_shapes=(dynamic,) if spec.name == "decoder" else dynamic,
            verbose=False,
        )
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # torch's stack traces: paths of this machine, and as long as the graph
        program.save(path)


def _dim(axis: str, dims: dict[str, Dim]) -> Dim:
    factor, _, name = axis.rpartition("*")
    return int(factor) * dims[name] if factor else dims[name]


def _example(tensor: TensorSpec) -> Tensor:
    shape = [axis_size(axis, TRACE_SIZES) for axis in tensor.axes]
    return torch.zeros(shape, dtype=getattr(torch, tensor.dtype))


def _largest_image(processor: CasaProcessor) -> int:
    """Image tokens of the largest image that the processor makes."""
    images = processor.image_processor
    return images.size["longest_edge"] // (images.patch_size * images.merge_size) ** 2


def _describe(config: CasaConfig, model: CasaForConditionalGeneration, dtype: str) -> dict:
    end = model.generation_config.eos_token_id
    return {
        "fusion": config.fusion,
        "ca_weights": config.ca_weights,
        "ca_placement": config.ca_placement,
        "backbone": config.text_config.model_type,
        "dtype": dtype,
        "opset": OPSET,
        "stop_token_ids": [end] if isinstance(end, int) else list(end or []),
        "image_token_id": config.image_token_id,
    }


def _clear(folder: Path) -> None:
    """Removes an older export; refuses a folder of other files."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        return
    if not (folder / FILE_NAME).is_file():
        raise ExportError(f"{folder} holds files that casa-export did not write; name a new or empty folder.")
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's remarks on its own internals off the terminal; errors still come through."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
