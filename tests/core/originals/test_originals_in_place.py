"""Originals are loaded where they are: through a view, with their weights linked and none of their code run."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from casa_engine.checkpoints import load_model, load_processor
from casa_engine.errors import CheckpointError, OutputError
from casa_engine.originals.auto import MODEL_TYPES
from casa_engine.originals.views import resolve_checkpoint
from casa_engine.presets import preset_config
from casa_engine.view_folder import view_root
from originals import FAMILIES, candidate_names, original_model, scrambled_names, write_json, write_original


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    """A model, and its original's folder."""
    source = original_model(request.param)
    return source, write_original(source, request.param, tmp_path / "original", candidate_names(request.param))


def assert_same_weights(model, source) -> None:
    ours, theirs = model.state_dict(), source.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.float(), theirs[name].float()), name


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
@pytest.mark.parametrize("trust", [None, True])
def test_auto_classes(pair, auto_class, trust) -> None:
    source, folder = pair
    options = {} if trust is None else {"trust_remote_code": trust}
    model = auto_class.from_pretrained(folder, dtype=torch.bfloat16, **options)
    assert model.dtype == torch.bfloat16
    assert_same_weights(model, source)
    assert model.generation_config.eos_token_id == [1, 257]
    assert not (folder / "executed").exists()


def test_load_model_and_processor(pair) -> None:
    source, folder = pair
    assert_same_weights(load_model(folder), source)
    processor = load_processor(folder)
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) == processor.image_token_id
    assert not (folder / "executed").exists()


def test_a_view_has_links_and_is_made_once(pair) -> None:
    _, folder = pair
    view = resolve_checkpoint(folder)
    weights = list(view.glob("*.safetensors"))
    assert weights and all(path.is_symlink() for path in weights)
    assert sum(path.lstat().st_size for path in view.iterdir()) < 200_000
    assert not list(view.glob("*.py")) and "auto_map" not in (view / "config.json").read_text()
    before = (view / "config.json").stat().st_mtime_ns
    assert resolve_checkpoint(folder) == view == resolve_checkpoint(view)
    assert (view / "config.json").stat().st_mtime_ns == before
    assert list(view_root().iterdir()) == [view]


def test_released_anew_is_another_view(pair) -> None:
    _, folder = pair
    view = resolve_checkpoint(folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    assert resolve_checkpoint(folder) != view


def test_another_tokenizer_is_another_view(pair) -> None:
    _, folder = pair
    view = resolve_checkpoint(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    write_json(folder / "tokenizer.json", content)
    assert resolve_checkpoint(folder) != view
    text = load_processor(folder).tokenizer.convert_ids_to_tokens(vocabulary[one])
    assert text == one


# Waits until another process has written as much.
MEET = """
import pathlib, sys, time
from casa_engine.originals import views

write = views.write_small_files


def meet(*arguments):
    write(*arguments)
    place = pathlib.Path(sys.argv[2])
    (place / sys.argv[3]).touch()
    while len(list(place.iterdir())) < 2:
        time.sleep(0.01)


views.write_small_files = meet
print(views.resolve_checkpoint(sys.argv[1]))
"""


def test_two_processes_at_once_have_one_view(pair, tmp_path) -> None:
    _, folder = pair
    (tmp_path / "place").mkdir()
    command = [sys.executable, "-c", MEET, folder, tmp_path / "place"]
    both = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "ab"]
    views = {one.communicate(timeout=300)[0].strip() for one in both}
    assert [one.returncode for one in both] == [0, 0]
    assert views == {str(resolve_checkpoint(folder))} == {str(path) for path in view_root().iterdir()}


@pytest.mark.parametrize("before", ["", "import model_hosting_container_standards.logging_config; "])
def test_what_was_chosen_is_said_in_every_program(tmp_path, before: str) -> None:
    """vLLM's server imports a library that raises the root logger's level to ERROR."""
    folder = write_original(original_model("helium"), "helium", tmp_path / "original", candidate_names("helium"))
    code = f"import sys; {before}from casa_engine.checkpoints import load_model; load_model(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert "What it does not say was chosen" in done.stderr and "fusion = ca" in done.stderr


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "chat_template.jinja", "tensor_map.json"])
def test_a_view_that_lost_a_file_is_written_anew(tmp_path, lost: str) -> None:
    source = original_model("helium")
    folder = write_original(source, "helium", tmp_path / "original", candidate_names("helium"))
    view = resolve_checkpoint(folder)
    (view / lost).unlink()
    leftover = view_root() / ".new-killed"
    leftover.mkdir()
    os.utime(leftover, (0, 0))
    assert resolve_checkpoint(folder) == view and (view / lost).is_file()
    assert list(view_root().iterdir()) == [view]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_view_of_another_user_is_refused(pair) -> None:
    view = resolve_checkpoint(pair[1])
    os.chown(view, 12345, 12345)
    with pytest.raises(OutputError, match="is another user's"):
        load_model(pair[1])


def test_what_was_loaded_is_said_where_it_is_asked_for(pair) -> None:
    model, loading = AutoModel.from_pretrained(pair[1], output_loading_info=True)
    assert_same_weights(model, pair[0])
    assert not loading["missing_keys"] and model.generation_config.eos_token_id == [1, 257]


def test_the_folders_own_map_is_read(tmp_path) -> None:
    names, source = scrambled_names(5), original_model("helium")
    folder = write_original(source, "helium", tmp_path / "original", names)
    with pytest.raises(CheckpointError, match="no place for"):
        load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"model_type": "llama"})
    with pytest.raises(CheckpointError, match="model_type 'llama'; expected 'casa'"):
        load_model(folder)
    lines = ["family = helium", 'config.fusion = "ca"', *(f"{names(name)} -> {name}" for name in source.state_dict())]
    (folder / "casa.map").write_text("\n".join(lines))
    assert_same_weights(load_model(folder), source)


def test_nan_is_refused_in_place(pair) -> None:
    _, folder = pair
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name, tensor = next(iter(tensors.items()))
    tensor.view(-1)[0] = float("inf")
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        load_model(folder)


def test_hostile_originals_are_refused_by_auto_classes(pair) -> None:
    _, folder = pair
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="programs that run when they are read"):
        AutoModel.from_pretrained(folder)


def test_a_cache_that_cannot_be_written(pair, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="Set XDG_CACHE_HOME"):
        load_model(pair[1])


def test_a_user_without_a_home(pair, monkeypatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", _no_home)
    with pytest.raises(OutputError, match="there is no home folder"):
        load_model(pair[1])


def _no_home() -> None:
    raise RuntimeError("Could not determine home directory.")


def test_names_on_a_hub_are_not_looked_up(pair) -> None:
    config = json.loads((pair[1] / "config.json").read_text())
    assert config["model_type"] in MODEL_TYPES
    with pytest.raises(CheckpointError, match="Download it first"):
        AutoConfig.for_model(config["model_type"]).from_dict(config, name_or_path="kyutai/CASA-Helium1-VL-2B")


def test_checkpoints_of_our_own_form_need_no_view(tmp_path) -> None:
    preset_config("tiny-llama").save_pretrained(tmp_path / "own")
    assert resolve_checkpoint(tmp_path / "own") == tmp_path / "own"
    shutil.rmtree(tmp_path / "own")
    assert resolve_checkpoint(tmp_path / "own") == tmp_path / "own"
    assert not view_root().exists()
