"""Checkpoints are read strictly, and `casa-checkpoint` says so in a sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from casa_engine.checkpoint_cli import main
from casa_engine.checkpoints import load_model, write_random_checkpoint
from casa_engine.errors import CheckpointError
from casa_engine.presets import preset_config


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    write_random_checkpoint(preset_config("tiny-llama"), folder)
    return folder


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "copy")


def edit(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_round_trip(good) -> None:
    model = load_model(good)
    stored = load_file(good / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name])


NORM = "model.language_model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), f"missing {NORM}"),
        (lambda t: t.update(stray=torch.zeros(2)), "unexpected stray"),
        (lambda t: t.update({NORM: torch.zeros(3)}), rf"{NORM} has shape \(3,\), expected \(64,\)"),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_wrong_tensor_is_named(copy, change, words: str) -> None:
    edit(copy, change)
    with pytest.raises(CheckpointError, match=words):
        load_model(copy)


def test_no_folder_no_weights_other_model_damaged_file(copy, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_model(tmp_path / "nothing")
    (copy / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_model(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        load_model(copy)
    (copy / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="model_type 'llama'; expected 'casa'"):
        load_model(copy)


def test_command_line(tmp_path, capsys) -> None:
    folder = tmp_path / "new"
    assert main(["random", "tiny-qwen", str(folder), "--fusion", "ca", "--ca-layers", "0", "2"]) == 0
    assert main(["check", str(folder)]) == 0
    assert load_model(folder).config.ca_layers == [0, 2]
    edit(folder, lambda tensors: tensors.pop(NORM))
    assert main(["check", str(folder)]) == 1
    assert f"casa-checkpoint: {folder} does not hold the model" in capsys.readouterr().err
    assert main(["random", "tiny-qwen", str(folder), "--ca-layers", "7"]) == 1
