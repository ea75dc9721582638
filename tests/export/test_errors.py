"""Wrong use: every error says what is wrong and what to do."""

import json
import shutil
import sys

import pytest
import torch

from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.errors import CheckpointError, InputError
from casa_engine.presets import preset_config
from casa_export import cli, trt_package
from casa_export.errors import ExportError, ManifestError, RunnerError
from casa_export.exported_model import ExportedModel
from casa_export.exporter import export_checkpoint
from casa_export.limits import Limits
from casa_export.trt_builder import build_engines
from casa_export.trt_runner import load_trt_model
from exports import LIMITS, checkpoint, export


@pytest.fixture
def copy(tmp_path):
    """A copy of an export, to be damaged."""
    return shutil.copytree(export("qwen", "ca_tv"), tmp_path / "export")


def images(grids, points):
    grids = torch.tensor(grids)
    pixels = torch.zeros(int(grids.prod(-1).sum()), 1176)
    return {"pixel_values": pixels, "image_grid_thw": grids, "insertion_points": torch.tensor(points)}


def test_unknown_checkpoint(tmp_path, capsys):
    assert cli.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    assert "no checkpoint folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        export_checkpoint(tmp_path / "empty", tmp_path / "out")


def test_unsupported_fusion(tmp_path):
    write_random_checkpoint(preset_config("tiny-llama", fusion="insertion"), tmp_path / "insertion")
    with pytest.raises(ExportError, match="'insertion' cannot be exported; expected 'ca' or 'ca_tv'"):
        export_checkpoint(tmp_path / "insertion", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_of_other_files_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ExportError, match="did not write"):
        export_checkpoint(checkpoint("qwen", "ca_tv"), tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("package", ["auto", "tensorrt", "tensorrt_rtx"])
def test_no_tensorrt_installed(copy, tmp_path, package, monkeypatch, capsys):
    for name in trt_package.PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)  # import says ModuleNotFoundError
    with pytest.raises(RunnerError, match=r"not installed\. Install it: pip install"):
        build_engines(copy, package)
    out = tmp_path / "out"
    assert cli.main([str(checkpoint("qwen", "ca_tv")), str(out), "--trt", package]) == 1
    assert "no TensorRT" in capsys.readouterr().err
    assert not out.exists(), "it must show before the export, not after"


def test_validation_of_bf16_is_refused_before_the_export(tmp_path, capsys):
    arguments = [str(checkpoint("qwen", "ca_tv")), str(tmp_path / "out"), "--dtype", "bf16"]
    assert cli.main(arguments) == 1
    assert "Add --no-validate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_image_above_the_limit(exported):
    with pytest.raises(InputError, match=r"image 1 has 72 image tokens; these graphs take up to 64"):
        exported(torch.tensor([[5, 6]]), **images([[1, 4, 4], [1, 16, 18]], [0, 1]))


def test_window_above_the_limit(exported):
    with pytest.raises(InputError, match=r"one window has 180 image tokens; these graphs take up to 128"):
        exported(torch.tensor([[5, 6]]), **images([[1, 12, 20]] * 3, [1, 1, 1]))


def test_text_above_the_limit(exported):
    with pytest.raises(InputError, match="170 text tokens; these graphs take up to 160"):
        exported(torch.full((1, 170), 5))
    with pytest.raises(InputError, match="180 text tokens"):
        exported.generate(torch.full((1, 100), 5), max_new_tokens=80)


def test_batch_above_the_limit(exported):
    with pytest.raises(InputError, match="4 rows; these graphs take up to 3"):
        exported(torch.full((4, 2), 5))


def test_sampling_is_refused(exported):
    with pytest.raises(InputError, match="greedily only"):
        exported.generate(torch.tensor([[5]]), do_sample=True)


def test_images_without_points(exported):
    given = images([[1, 4, 4]], [0])
    del given["insertion_points"]
    with pytest.raises(InputError, match="1 images with no insertion points"):
        exported(torch.tensor([[5, 6]]), **given)


@pytest.mark.parametrize("name", ["vision.onnx", "decoder.onnx"])
def test_damaged_graph_file(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ManifestError, match=rf"{name} is damaged.*hash"):
        ExportedModel.load(copy)
    with pytest.raises(ManifestError, match="is damaged"):
        build_engines(copy)


def test_missing_graph_file(copy):
    (copy / "image_kv.onnx").unlink()
    with pytest.raises(ManifestError, match=r"image_kv\.onnx is missing"):
        ExportedModel.load(copy)


def test_graph_that_is_no_graph_without_hashes(copy):
    (copy / "decoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(ManifestError, match="cannot load"):
        ExportedModel.load(copy, check_hashes=False)


def test_manifest_of_a_newer_version(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(ManifestError, match="format version 99; this casa-export reads up to 1"):
        ExportedModel.load(copy)


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 1}'])
def test_broken_manifest(copy, content):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(ManifestError, match="Export the model again"):
        ExportedModel.load(copy)


def test_no_manifest(tmp_path, capsys):
    assert cli.main(["run", str(tmp_path), "--prompt", "Hello"]) == 1
    assert "expected a folder that casa-export wrote" in capsys.readouterr().err


def test_no_cuda_provider(copy):
    with pytest.raises(RunnerError, match="has no CUDAExecutionProvider"):
        ExportedModel.load(copy, device="cuda")


def test_no_engines(copy):
    with pytest.raises(ManifestError, match=r"no engines\.json; build the engines with casa-export --trt"):
        load_trt_model(copy)


def test_picture_that_is_none(copy, tmp_path, capsys):
    (tmp_path / "picture.png").write_text("hello")
    arguments = ["run", str(copy), "--prompt", "What?", "--image", str(tmp_path / "picture.png")]
    assert cli.main(arguments) == 1
    assert "its content is neither JPEG, PNG nor WebP" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"), [({"batch": 0}, "limit batch is 0"), ({"call_image_tokens": 10}, "below image_tokens")]
)
def test_limits_that_make_no_sense(change, words):
    with pytest.raises(ExportError, match=words):
        Limits(**(LIMITS | change))
