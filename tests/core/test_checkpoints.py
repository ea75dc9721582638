"""Checkpoints are read strictly, and `casa-checkpoint` says so in a sentence."""

import json
import os
import re
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


@pytest.fixture
def sharded(good, tmp_path):
    """The same model in shards with an index, as transformers writes large ones."""
    folder = shutil.copytree(good, tmp_path / "sharded")
    load_model(good).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


INDEX = "model.safetensors.index.json"


def change_index(folder, change) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def test_shards_are_loaded(sharded, good) -> None:
    assert main(["check", str(sharded)]) == 0
    for one, other in zip(load_model(sharded).parameters(), load_model(good).parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / INDEX).unlink(), f"no {INDEX}; expected model.safetensors, or shards"),
        (lambda folder: (folder / INDEX).write_text("{"), "is not an index of safetensors"),
        (lambda folder: (folder / INDEX).write_text("[]"), "is not an index of safetensors"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": []}'), "is not an index of safetensors"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'), "expected files of the folder itself"),
        (lambda folder: change_index(folder, lambda m: m.update({NORM: "../x.safetensors"})), "files of the folder"),
        (lambda folder: change_index(folder, lambda m: m.update({NORM: 5})), "files of the folder"),
        (lambda folder: change_index(folder, lambda m: m.pop(NORM)), f"do not fit together: {NORM}"),
        (lambda folder: change_index(folder, lambda m: m.update(stray=m[NORM])), "do not fit together: stray"),
        (lambda folder: next(folder.glob("model-*.safetensors")).unlink(), "which model.safetensors.index.json names"),
        (lambda folder: shutil.copy(next(folder.glob("model-*")), folder / "model.safetensors"), "has both"),
        (lambda folder: shutil.copy(next(folder.glob("model-*")), folder / "old.safetensors"), "has old.safetensors"),
    ],
)
def test_damaged_shards_are_refused_by_check_and_by_loading(sharded, capsys, damage, words: str) -> None:
    damage(sharded)
    assert main(["check", str(sharded)]) == 1
    assert re.search(words, capsys.readouterr().err)
    with pytest.raises(CheckpointError, match=words):
        load_model(sharded)


def test_stray_weights_beside_one_file_are_refused(copy) -> None:
    shutil.copy(copy / "model.safetensors", copy / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="not part of the weights"):
        load_model(copy)


def test_a_new_checkpoint_over_shards_is_whole(sharded) -> None:
    write_random_checkpoint(preset_config("tiny-llama"), sharded)
    assert main(["check", str(sharded)]) == 0


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert main(["random", "tiny-llama", str(tmp_path / "new")]) == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == {0o666 & ~umask}
