"""A checkpoint -> a folder of three ONNX graphs, tokenizer and processor files and a manifest."""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from casa_engine.checkpoints import check_tensors, load_model, load_processor, read_config, stored_shapes
from casa_engine.configuration import CasaConfig
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.originals.views import resolve_checkpoint
from casa_engine.processing_casa import CasaProcessor
from casa_engine.token_ids import list_token_ids
from casa_export.errors import ExportError
from casa_export.export_folder import stage_export
from casa_export.graph_spec import GraphSpec, TensorSpec, axis_size, graph_specs
from casa_export.graphs import GRAPHS
from casa_export.limits import Limits, default_limits
from casa_export.manifest import Manifest, folder_hash, graph_file, read_manifest
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


@dataclass(frozen=True)
class ExportPlan:
    """What an export is made from, checked.

    Attributes:
        source: The checkpoint's folder.
        dtype: One of `DTYPES`.
        config: Its configuration.
        processor: Its processor.
        limits: Largest sizes.
        specs: Inputs and outputs of every graph.
        weight_bytes: Size of its weights in the dtype: less than that an export never has.
    """

    source: Path
    dtype: str
    config: CasaConfig
    processor: CasaProcessor
    limits: Limits
    specs: dict[str, GraphSpec]
    weight_bytes: int


def plan_export(source: str | Path, dtype: str = "fp32", limits: dict[str, int | None] | None = None) -> ExportPlan:
    """Check everything about an export that can be known before it; write nothing.

    Args:
        source: The checkpoint's folder.
        dtype: Of weights and caches: one of `DTYPES`.
        limits: Fields of `Limits`; None leaves one to its default.

    Raises:
        CheckpointError: The checkpoint is not as its configuration says.
        ExportError: Its fusion, the dtype or a limit cannot be exported.
    """
    source = resolve_checkpoint(source)
    if dtype not in DTYPES:
        raise ExportError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    config = read_config(source)
    check_exportable(config)
    check_tensors(source, config)
    processor = load_processor(source)
    chosen = default_limits(config, processor.max_image_tokens, **(limits or {}))
    specs = graph_specs(config, str(DTYPES[dtype]).removeprefix("torch."))
    weight_bytes = sum(map(math.prod, stored_shapes(source).values())) * DTYPES[dtype].itemsize
    return ExportPlan(source, dtype, config, processor, chosen, specs, weight_bytes)


def export_checkpoint(
    source: str | Path,
    folder: str | Path,
    dtype: str = "fp32",
    limits: dict[str, int | None] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Export a checkpoint, as one transaction: `folder` is as before or has the new export.

    Args:
        source: The checkpoint's folder.
        folder: Where to write; an older export there is replaced, files of others stay.
        dtype: Of weights and caches: one of `DTYPES`.
        limits: Fields of `Limits`; None leaves one to its default.
        progress: Reports every step; silent by default.

    Returns:
        The manifest that was written.

    Raises:
        CheckpointError: The checkpoint is not as its configuration says.
        ExportError: It cannot be exported, or the target holds other files only.
        OutputError: The target cannot be written.
    """
    plan = plan_export(source, dtype, limits)
    with stage_export(plan.source, Path(folder), plan.weight_bytes) as staged:
        write_export(plan, staged.path, progress)
        staged.commit()
    return read_manifest(folder)


def write_export(plan: ExportPlan, folder: Path, progress: Progress | None = None) -> None:
    """Write graphs, tokenizer, processor and manifest into an empty folder."""
    progress = progress or Progress(NUM_STEPS, None)
    with progress.step(f"load {plan.source.name} as {plan.dtype}"):
        model = load_model(plan.source, DTYPES[plan.dtype])
    for name, spec in plan.specs.items():
        with progress.step(f"export {name}"):
            export_graph(model, spec, folder / graph_file(name))
    with progress.step("write tokenizer, processor and configuration"):
        plan.processor.save_pretrained(folder)
        plan.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    with progress.step("hash files and write the manifest"):
        Manifest(
            model=_describe(plan.config, model, plan.dtype),
            source={"name": plan.source.name, "sha256": folder_hash(plan.source)},
            limits=plan.limits,
            axes=plan.limits.axes(plan.config),
            graphs=plan.specs,
            versions={name: version(name) for name in VERSIONS},
        ).write(folder)


def check_exportable(config: CasaConfig) -> None:
    """Raise ExportError unless the configuration is one that the graphs can express."""
    if not config.is_cross_attention:
        raise ExportError(
            f"fusion {config.fusion!r} cannot be exported; expected 'ca' or 'ca_tv'. Token-insertion models are "
            "ordinary language models: export them with a general tool."
        )


def export_graph(model: CasaForConditionalGeneration, spec: GraphSpec, path: Path) -> None:
    """Write one graph; weights over 2 GB as external data beside it."""
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


def _describe(config: CasaConfig, model: CasaForConditionalGeneration, dtype: str) -> dict:
    return {
        "fusion": config.fusion,
        "ca_weights": config.ca_weights,
        "ca_placement": config.ca_placement,
        "backbone": config.text_config.model_type,
        "dtype": dtype,
        "opset": OPSET,
        "stop_token_ids": list_token_ids(model.generation_config.eos_token_id),
        "image_token_id": config.image_token_id,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on its own internals off the terminal; errors still come through."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
