"""`casa checkpoint verify` against a reference that a checkpoint's own code wrote, in a process of its own."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from casa_engine.checkpoint_cli import main
from originals import FAMILIES, candidate_names, original_model, write_original
from programs import output_of

REMOTE_CODE = Path(__file__).parents[2] / "support" / "remote_code"
SCRIPT = Path(__file__).parents[3] / "scripts" / "reference_outputs.py"
# As a published model's own code: the calls of the public scripts, with another implementation behind them, which is
# this engine's, on the weights that were converted before; a mistake in names or fields is seen all the same.
CONFIGURATION = """
from transformers import PretrainedConfig


class Config(PretrainedConfig):
    model_type = "CASA_Helium1_VL_2B"
"""
MODEL = """
from types import SimpleNamespace

import torch
from torch import nn

from .configuration_casa import Config


class Model:
    @classmethod
    def from_pretrained(cls, folder, **options):
        return cls(folder)

    @classmethod
    def register_for_auto_class(cls, **options):
        pass

    def __init__(self, folder):
        from casa_engine.checkpoints import load_model

        self.model = load_model(SOURCE)

    def to(self, device):
        return self

    def eval(self):
        return self

    def __call__(self, input_ids, attention_mask, use_cache, pixel_values=None, image_embeds_insertion_points=None):
        images = {}
        if pixel_values is not None:
            rows, columns, _ = pixel_values[0].shape
            blocks = pixel_values[0].reshape(rows // 2, 2, columns // 2, 2, 3, 196).permute(0, 2, 1, 3, 4, 5)
            frames = torch.stack([blocks, blocks], dim=5)
            images = {
                "pixel_values": frames.reshape(rows * columns, 1176),
                "image_grid_thw": torch.tensor([[1, rows, columns]]),
                "insertion_points": image_embeds_insertion_points[0][None],
            }
        return self.model(input_ids=input_ids, **images)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A converted checkpoint, and the reference of its original."""
    root = tmp_path_factory.mktemp("verify")
    folder = write_original(original_model("helium"), "helium", root / "original", candidate_names("helium"))
    assert main(["convert", str(folder), str(root / "out")]) == 0
    (folder / "configuration_casa.py").write_text(CONFIGURATION)
    (folder / "modeling_casa.py").write_text(MODEL.replace("SOURCE", repr(str(root / "out"))))
    home = {"HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1"}
    output_of(sys.executable, SCRIPT, folder, root / "reference.npz", folder=root, **home)
    return root / "out", root / "reference.npz"


def test_the_same_model_is_the_same(written, capsys) -> None:
    out, reference = written
    assert main(["verify", str(out), "--reference", str(reference)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(line.startswith("ok ") for line in lines)
    assert any("pairs of neighbours rotated" in line for line in lines)


def test_other_rows_of_one_projection_are_seen(written, tmp_path, capsys) -> None:
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(written[0], tmp_path / "copy")
    for file in copy.glob("model-*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("1.cross_attn.v_proj.weight"):
                tensors[name] = tensors[name].flip(0)
        save_file(tensors, file, {"format": "pt"})
    assert main(["verify", str(copy), "--reference", str(written[1])]) == 1
    captured = capsys.readouterr()
    assert "FAIL image: logits" in captured.out and "ok   text: logits" in captured.out
    assert "differs from" in captured.err


def test_what_is_no_reference(written, tmp_path, capsys) -> None:
    np.savez(tmp_path / "other.npz", about=np.array('{"dtype": "float32"}'))
    for path in (tmp_path / "other.npz", tmp_path / "none.npz", written[0] / "config.json"):
        assert main(["verify", str(written[0]), "--reference", str(path)]) == 1
        assert "Write one with scripts/reference_outputs.py" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_with_other_code_in_the_versions_of_the_originals(tmp_path, family, capsys, monkeypatch) -> None:
    """The documented command: uv installs transformers 4.51.3 and torch 2.7.0, whose own parts compute the model."""
    folder = write_original(original_model(family), family, tmp_path / "original", candidate_names(family))
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    shutil.copytree(REMOTE_CODE, folder, dirs_exist_ok=True)
    reference = tmp_path / "reference.npz"
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    output_of(Path(sys.executable).with_name("uv"), "run", SCRIPT, folder, reference, folder=tmp_path, **home)
    with np.load(reference) as file:
        assert '"torch": "2.7.0' in str(file["about"])
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out"), "--reference", str(reference)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 7 and all(line.startswith("ok ") for line in lines)
