"""Checkpoints are read strictly, and `casa-checkpoint` says so in a sentence."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from casa_engine.checkpoint_cli import main
from casa_engine.checkpoint_folder import list_files, owned_files
from casa_engine.checkpoints import load_model, write_random_checkpoint
from casa_engine.digits import checkpoint_path
from casa_engine.errors import CheckpointError
from casa_engine.presets import preset_config
from casa_engine.processing_casa import CasaProcessor
from casa_engine.tokenization import byte_tokenizer, chat_template
from killing import ended_at
from tiny_presets import TINY_PRESETS


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


@pytest.mark.parametrize("weights", ["own", "shared"])
@pytest.mark.parametrize("preset", TINY_PRESETS)
def test_round_trip(tmp_path, preset: str, weights: str) -> None:
    config = preset_config(preset, ca_weights=weights)
    write_random_checkpoint(config, tmp_path / "model")
    loaded = load_model(tmp_path / "model").state_dict()
    if config.tie_word_embeddings:
        assert torch.equal(loaded.pop("lm_head.weight"), loaded["model.language_model.embed_tokens.weight"])
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert loaded.keys() == stored.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, stored[name])


def test_first_of_several_end_ids_ends_a_turn() -> None:
    """A tokenizer whose end of a turn is none of the stop tokens would never stop."""
    config = preset_config("tiny-llama")
    config.text_config.eos_token_id = [300, 1]
    assert byte_tokenizer(config).eos_token_id == 300


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
    assert main(["random", "tiny-qwen", str(tmp_path / "other"), "--ca-layers", "7"]) == 1
    assert "layers [7]; the backbone has layers 0 to 2" in capsys.readouterr().err


@pytest.fixture
def sharded(good, tmp_path):
    """The same model in shards with an index, as transformers writes large ones."""
    folder = shutil.copytree(good, tmp_path / "sharded")
    load_model(good).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    list_files(folder)  # as if they were written by us: others' weights are not written over
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


def tree(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_random_checkpoint_replaces_its_own_files_only(tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    assert main(["random", "tiny-llama", str(folder)]) == 0
    (folder / "notes.txt").write_text("mine")
    (folder / "runs").mkdir()
    (folder / "runs/1.log").write_text("mine too")
    first = tree(folder)
    assert main(["random", "tiny-llama", str(folder), "--seed", "1"]) == 0
    second = tree(folder)
    assert second["notes.txt"] == b"mine" and second["runs/1.log"] == b"mine too"
    assert second.keys() == first.keys() and second["model.safetensors"] != first["model.safetensors"]
    load_model(folder)
    edit(folder, lambda tensors: tensors[NORM].add_(1))  # as by a training
    trained = tree(folder)
    capsys.readouterr()
    assert main(["random", "tiny-llama", str(folder)]) == 1
    assert "model.safetensors, which casa-engine did not write, or which was changed" in capsys.readouterr().err
    assert tree(folder) == trained and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["config.json", "pytorch.safetensors", "model.safetensors.index.json"])
def test_other_models_are_not_overwritten(tmp_path, name, capsys) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / name).write_text("{}")
    assert main(["random", "tiny-llama", str(folder)]) == 1
    assert name in capsys.readouterr().err
    assert tree(folder) == {name: b"{}"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["Ctrl-C", "full"])
def test_interrupted_checkpoint_leaves_the_old(tmp_path, error, capsys, monkeypatch) -> None:
    folder = tmp_path / "model"
    assert main(["random", "tiny-llama", str(folder)]) == 0
    before = tree(folder)

    def fail(*arguments, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(CasaProcessor, "save_pretrained", fail)
        for target in (folder, tmp_path / "new"):
            assert main(["random", "tiny-llama", str(target)]) == 1
            last = capsys.readouterr().err.splitlines()[-1]
            assert last.startswith("casa-checkpoint: ") and last.endswith(".")
    assert tree(folder) == before and list(tmp_path.iterdir()) == [folder]
    assert main(["random", "tiny-llama", str(folder)]) == 0


def test_killed_checkpoint_leaves_the_old_or_the_new(tmp_path) -> None:
    folder = tmp_path / "model"
    arguments = ["random", "tiny-llama", str(folder)]

    def write_other() -> None:
        torch.set_num_threads(1)  # a forked process has none of the others
        main([*arguments, "--seed", "1"])

    assert main(arguments) == 0
    old = tree(folder)
    write_other()
    new = tree(folder)
    assert main(arguments) == 0
    (folder / "notes.txt").write_text("mine")
    step, seen = 0, set()
    while ended_at(step, tmp_path, write_other):
        found = tree(folder)
        assert found.pop("notes.txt") == b"mine"
        seen.add("old" if found == old else "new" if found == new else f"neither at step {step}")
        step += 1
    assert main(arguments) == 0
    assert tree(folder) == old | {"notes.txt": b"mine"} and list(tmp_path.iterdir()) == [folder]
    assert seen == {"old", "new"}


def test_full_disk_of_every_library(tmp_path) -> None:
    """Real writers on a real full file system, in a mount namespace: safetensors says it in words of Rust."""
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "x", tmp_path], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    script = """
import subprocess, sys
from pathlib import Path
from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.errors import OutputError
from casa_engine.presets import preset_config
from casa_engine.staged_folder import StagedFolder
disk = Path(sys.argv[1])
StagedFolder._check_space = lambda self: None  # it would refuse before any library writes
for size in ("8k", "100k", "200k"):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "x", disk], check=True)
    try:
        write_random_checkpoint(preset_config("tiny-llama"), disk / "model")
    except OutputError as error:
        print(error)
    assert list(disk.iterdir()) == []
"""
    run = subprocess.run(["unshare", "-m", sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("No space left on device") == len(run.stdout.splitlines()) == 3


def test_list_of_the_embedded_checkpoint_is_true() -> None:
    """So that a training may replace it."""
    names = {path.name for path in checkpoint_path().iterdir() if path.is_file()}
    assert owned_files(checkpoint_path()) == names, "a file was changed by hand: call list_files(checkpoint_path())"


def test_the_embedded_checkpoint_has_the_template_of_this_engine() -> None:
    assert (checkpoint_path() / "chat_template.jinja").read_text() == chat_template()
