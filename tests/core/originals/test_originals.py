"""Synthetic originals are inspected, mapped by proposals, and converted; what is not certain is said."""

import json
import logging
import os

import pytest
import torch

from casa_engine.checkpoint_cli import main
from casa_engine.checkpoints import load_model, load_processor
from casa_engine.originals.snapshot import read_snapshot
from casa_engine.originals.views import resolve_checkpoint
from originals import (
    FAMILIES,
    candidate_names,
    edit_json,
    logits,
    original_model,
    plan_of,
    scrambled_names,
    write_json,
    write_original,
)

VARIANTS = {
    "own": {},
    "shared": {"ca_weights": "shared"},
    "some-layers-image_norm": {"ca_layers": [0, 2], "image_norm": True, "normalize_image_tokens": False},
    "insertion": {"fusion": "insertion"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_candidate_names_are_converted_without_a_map(tmp_path, family: str, variant: str, capsys) -> None:
    source = original_model(family, **VARIANTS[variant])
    folder = write_original(source, family, tmp_path / "original", candidate_names(family))
    if variant == "insertion":
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", config | {"model_type": f"{family}_VL", "architectures": [], "auto_map": {}})
        if family == "helium":
            assert main(["convert", str(folder), str(tmp_path / "out")]) == 1
            assert "config.image_token_id in a map file" in capsys.readouterr().err
        (tmp_path / "map").write_text("config.image_token_id = 381\n")
    maps = ["--map", str(tmp_path / "map")] if (tmp_path / "map").exists() else []
    assert main(["convert", str(folder), str(tmp_path / "out"), *maps]) == 0
    assert "OPEN image_position_offset = 0" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "out")]) == 0
    model = load_model(tmp_path / "out")
    for field in ("fusion", "ca_layers", "image_norm", "normalize_image_tokens", "mrope_section", "post_image_tokens"):
        assert getattr(model.config, field) == getattr(source.config, field), field
    assert torch.allclose(logits(model), logits(source), rtol=0, atol=1e-6)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_beside_the_weights(tmp_path, family: str) -> None:
    folder = write_original(original_model(family), family, tmp_path / "original", candidate_names(family))
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    origin = json.loads((out / "original.json").read_text())
    fingerprint = read_snapshot(folder).fingerprint
    assert origin["fingerprint"] == fingerprint == json.loads((out / "config.json").read_text())["source_fingerprint"]
    assert len(origin["files"]["model-00002-of-00003.safetensors"]["sha256"]) == 64
    assert origin["fields"]["text_config.rope_theta"] == [10000.0, "config.json: rope_base", "unverified"]
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 257] and generation["repetition_penalty"] == 1.05
    assert "auto_map" not in "".join(path.read_text() for path in out.glob("*.json"))
    assert not list(out.glob("*.py")) and len(list(out.glob("model-*.safetensors"))) == 3
    processor = load_processor(out)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}], add_generation_prompt=True
    )
    assert prompt.count(processor.image_token) == 1
    ids = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    at = ids.index(processor.image_token_id)
    assert (ids[at - 1], ids[at + 1]) == (382, 383)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_scrambled_names_take_proposals_and_ten_lines(tmp_path, family: str, seed: int, capsys) -> None:
    names, source = scrambled_names(seed), original_model(family, seed, image_norm=True)
    folder = write_original(source, family, tmp_path / "original", names)
    proposed, corrections = tmp_path / "proposed.map", tmp_path / "corrections.map"
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 1  # never without being asked
    assert "no place for m" in capsys.readouterr().err
    assert main(["inspect", str(folder), "--proposals", str(proposed)]) == 0
    parts = plan_of(folder, proposed).assignment.parts
    right = {names(name): name for name in source.state_dict()}
    wrong = [name for name, mine in parts.items() if [part.name for part in mine] != [right[name]]]
    wrong += plan_of(folder, proposed).assignment.leftovers
    assert len(wrong) <= 0.05 * len(read_snapshot(folder).tensors)
    corrections.write_text("".join(f"{name} -> {right[name]}\n" for name in wrong))
    assert len(corrections.read_text().splitlines()) <= 10
    assert main(["convert", str(folder), str(tmp_path / "out"), "--map", str(proposed), "--map", str(corrections)]) == 0
    assert torch.allclose(logits(load_model(tmp_path / "out")), logits(source), rtol=0, atol=1e-6)


def test_headers_file_stands_for_the_folder(tmp_path, capsys) -> None:
    folder = write_original(original_model("qwen"), "qwen", tmp_path / "original", scrambled_names(1))
    headers = tmp_path / "headers.json"
    assert main(["inspect", str(folder), "--headers-only", str(headers)]) == 1
    assert headers.stat().st_size < 20_000
    from_folder = capsys.readouterr().out.replace(str(folder), "X").splitlines()[2:]
    assert main(["inspect", str(headers)]) == 1
    assert capsys.readouterr().out.replace(str(headers), "X").splitlines()[1:] == from_folder
    assert read_snapshot(headers).fingerprint == read_snapshot(folder).fingerprint
    assert main(["inspect", str(headers), "--proposals", str(tmp_path / "map")]) == 0
    assert main(["convert", str(headers), str(tmp_path / "out"), "--map", str(tmp_path / "map")]) == 1
    assert "holds no weights to convert" in capsys.readouterr().err


def test_what_is_not_certain_is_said_wherever_an_original_is_taken(copy, tmp_path, capsys, caplog, monkeypatch) -> None:
    caplog.set_level(logging.WARNING, "casa_engine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    edit_json(copy, "preprocessor_config.json", resample=2, max_pixels=5000, image_mean=[0.1, 0.2, 0.3])
    edit_json(copy, "generation_config.json", min_p=0.1)
    edit_json(copy, "config.json", asst_end_tokens=[7])
    (copy / "casa.map").write_text("config.image_position_offset = 1\n")
    assert main(["convert", str(copy), str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        f"MAP {copy / 'casa.map'}",
        "OPEN fusion = ca: this engine's choice of ca and ca_tv",
        "OPEN chat_template = this engine's: this engine's choice: the original has none",
        "UNVERIFIED text_config.rope_theta = 10000.0: config.json: rope_base",
        "UNVERIFIED ca_layers = None: the tensors",
        "UNREAD asst_end_tokens = [7]",
        "UNREAD preprocessor_config.json:resample = 2",
        "UNREAD preprocessor_config.json:max_pixels = 5000",
        "UNREAD generation_config.json:min_p = 0.1",
    ):
        assert line in lines
    assert not any("image_mean" in line or "image_position_offset" in line for line in lines)
    assert main(["inspect", str(copy)]) == 0
    assert "  preprocessor_config.json:resample = 2" in capsys.readouterr().out.splitlines()
    resolve_checkpoint(copy)
    said = caplog.text
    for words in (
        "rope_theta = 10000.0",
        "preprocessor_config.json:resample",
        str(copy / "casa.map"),
        "chat_template = ",
    ):
        assert words in said


def test_layers_of_shared_weights_are_open(tmp_path) -> None:
    source = original_model("helium", ca_weights="shared")
    folder = write_original(source, "helium", tmp_path / "original", candidate_names("helium"))
    value = plan_of(folder).values["ca_layers"]
    assert (value.value, value.status) == (None, "open")


@pytest.mark.parametrize(
    ("template", "status"),
    [
        ("<turn>user {{ messages }}", "open"),
        ("<|image_pad|>{{ messages }}", "known"),
        ([{"name": "tool", "template": "x"}, {"name": "default", "template": "<|image_pad|>y"}], "known"),
        ([{"name": "tool", "template": "<|image_pad|>"}], "open"),
    ],
)
def test_which_chat_template_counts_is_said(copy, tmp_path, template, status: str) -> None:
    edit_json(copy, "tokenizer_config.json", chat_template=template)
    value = plan_of(copy).values["chat_template"]
    assert value.status == status and value.value == ("the original's" if status == "known" else "this engine's")
    assert main(["convert", str(copy), str(tmp_path / "out")]) == 0
    own = template if isinstance(template, str) else template[-1]["template"]
    assert (load_processor(tmp_path / "out").chat_template == own) == (status == "known")


def test_a_unigram_tokenizer_gets_the_marker_behind_its_last_token(copy, tmp_path) -> None:
    content = json.loads((copy / "tokenizer.json").read_text())
    tokens = {token_id: token for token, token_id in content["model"]["vocab"].items()}
    rows = [[tokens.get(token_id, f"<{token_id}>"), -1.0] for token_id in range(max(tokens) + 1)]
    content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": rows, "byte_fallback": False}
    write_json(copy / "tokenizer.json", content)
    assert main(["convert", str(copy), str(tmp_path / "out")]) == 0
    processor = load_processor(tmp_path / "out")
    assert processor.image_token_id == len(rows) == load_model(tmp_path / "out").config.image_token_id
    ids = processor.tokenizer("a<|image_pad|>b", add_special_tokens=False)["input_ids"]
    assert ids.count(len(rows)) == 1 and len(ids) == 3


def test_links_of_the_hubs_cache_are_followed(copy, tmp_path) -> None:
    home = tmp_path / "models--kyutai--CASA-Helium1-VL-2B"
    snapshot = home / "snapshots" / "abc"
    (home / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in copy.iterdir():
        path.rename(home / "blobs" / path.name)
        (snapshot / path.name).symlink_to(os.path.relpath(home / "blobs" / path.name, snapshot))
    assert main(["convert", str(snapshot), str(tmp_path / "out")]) == 0


def test_the_name_and_the_paper_tell_livecc(copy) -> None:
    edit_json(copy, "config.json", _name_or_path="kyutai/CASA-Qwen2_5-VL-3B-LiveCC", model_type="CASA_Helium")
    assert plan_of(copy).values["fusion"].value == "ca_tv"
