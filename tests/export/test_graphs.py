"""The files themselves: valid ONNX, every axis named, no trace of the machine that made them."""

import json

import onnx
import pytest

from casa_export.graph_spec import axis_size
from casa_export.manifest import read_manifest
from exports import KINDS, export

GRAPHS = ("vision", "image_kv", "decoder")


@pytest.fixture(params=KINDS, ids="-".join, scope="module")
def folder(request):
    return export(*request.param)


@pytest.mark.parametrize("graph", GRAPHS)
def test_checker_passes(folder, graph):
    onnx.checker.check_model(onnx.load(folder / f"{graph}.onnx"), full_check=True)


@pytest.mark.parametrize("graph", GRAPHS)
def test_shape_inference_names_every_axis(folder, graph):
    model = onnx.shape_inference.infer_shapes(
        onnx.load(folder / f"{graph}.onnx"), check_type=True, strict_mode=True, data_prop=True
    )
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    named = {value.name for value in values} | {tensor.name for tensor in model.graph.initializer}
    unknown = [
        value.name
        for value in values
        for axis in value.type.tensor_type.shape.dim
        if not (axis.dim_param or axis.HasField("dim_value"))
    ]
    assert unknown == []
    assert {output for node in model.graph.node for output in node.output if output} <= named


@pytest.mark.parametrize("graph", GRAPHS)
def test_manifest_describes_the_file(folder, graph):
    """Names, order, dtypes and axes; an axis may be written another way, so sizes are compared."""
    manifest, model = read_manifest(folder), onnx.load(folder / f"{graph}.onnx")
    spec = manifest.graphs[graph]
    sizes = {name: 3 + index for index, name in enumerate(manifest.axes[graph])}
    for tensors, values in ((spec.inputs, model.graph.input), (spec.outputs, model.graph.output)):
        assert [tensor.name for tensor in tensors] == [value.name for value in values]
        for tensor, value in zip(tensors, values, strict=True):
            kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            assert str(kind) == tensor.dtype
            shape = [
                eval(axis.dim_param, {}, sizes) if axis.dim_param else axis.dim_value
                for axis in value.type.tensor_type.shape.dim
            ]
            assert shape == [axis_size(axis, sizes) for axis in tensor.axes], tensor.name


def test_no_paths_and_no_weights_twice(folder):
    for graph in GRAPHS:
        content = (folder / f"{graph}.onnx").read_bytes()
        assert b"site-packages" not in content and b".py" not in content
    described = json.loads((folder / "manifest.json").read_text())
    assert described["source"]["name"] == folder.name.removesuffix("-onnx")
    assert set(described["files"]) == {path.name for path in folder.iterdir() if path.is_file()} - {"manifest.json"}


def test_files_can_be_read_by_whom_the_umask_lets(folder, tmp_path):
    (tmp_path / "new").touch()
    mode = (tmp_path / "new").stat().st_mode & 0o777
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()} == {mode}
