"""Map files override what the tables know: their two forms, their patterns, their mistakes."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from casa_engine.checkpoint_cli import main
from casa_engine.checkpoints import load_model
from casa_engine.errors import CheckpointError
from casa_engine.originals.rules import Rule
from casa_engine.weight_files import INDEX
from originals import candidate_names, edit_json, logits, original_model, plan_of, write_json, write_original


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("nothing.{layer} -> lm_head.weight", "line 1: 'nothing.{layer}' is the name of no tensor"),
        ("model.* -> model.{layer}.x", "has placeholders that"),
        ("model.norm.weight", "expected THERE -> HERE"),
        ("config.fusion = ca", "write texts in quotes"),
        ("config.size = 3", "config.size, which is no field"),
        ("config.ca_layers <- nowhere", "from nowhere, which is nowhere"),
        ("family = llama", "expected one of helium, qwen"),
        ('{"tensor": {}}', "it has 'tensor'; expected family, tensors, set, take"),
        ("model.norm.weight -> -", "nothing fills model.language_model.norm.weight"),
        ("*a*a*a*a*a*b -> -", "expected at most 2 times *"),
        ("*.a.*.b.* -> -", "expected at most 2 times *"),
        ("model.{a}{b}.weight -> -", "no two placeholders without a dot between them"),
        ("blocks.{0}.wq -> a.{0}", "has braces that are no placeholder"),
        ("blocks.{.wq -> -", "has braces that are no placeholder"),
        ("\n".join(f"t.{number} -> -" for number in range(1001)), "1001 tensors are named; expected at most 1000"),
    ],
)
def test_mistakes_in_a_map(original, tmp_path, lines: str, words: str) -> None:
    (tmp_path / "map").write_text(lines)
    with pytest.raises(CheckpointError) as caught:
        plan_of(original, tmp_path / "map").check()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        ("*.{layer}.*", "a.1.b.2.c", ("a|1|b.2.c",)),
        ("a.*", "a.b.c", ("b.c|",)),
        ("*.{layer}.*.x", "a.b.3.c.x", ("a.b|3|c",)),
        ("*.a.*.b", "a" * 512, None),
        ("*.a.*.b", ".a" * 256, None),
    ],
)
def test_patterns_never_try_a_star_twice(source: str, name: str, expected) -> None:
    target = "*|{layer}|*" if "{layer}" in source else ("*|" if source.count("*") == 1 else "-")
    assert Rule(source, target).apply(name) == expected


def test_a_map_as_json_and_its_fields(original, tmp_path) -> None:
    edited = shutil.copytree(original, tmp_path / "copy")
    edit_json(edited, "config.json", model_type="x", architectures=[], where=[0, 1, 2])
    content = {"family": "helium", "set": {"fusion": "ca_tv", "image_norm": False}, "take": {"ca_layers": "where"}}
    write_json(tmp_path / "map", content)
    plan = plan_of(edited, tmp_path / "map")
    plan.check()
    assert (plan.config.fusion, plan.config.ca_layers, plan.values["fusion"].status) == ("ca_tv", [0, 1, 2], "given")


def test_fused_projections_are_cut(tmp_path) -> None:
    source = original_model("helium")
    names = candidate_names("helium")
    folder = write_original(source, "helium", tmp_path / "original", names, shards=1)
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    for layer in range(3):
        fused = [tensors.pop(f"model.layers.{layer}.self_attn.{part}_proj_casa.weight") for part in "qkv"]
        tensors[f"model.layers.{layer}.in_proj"] = torch.cat(fused)
    save_file(tensors, file)
    write_json(folder / INDEX, {"weight_map": dict.fromkeys(tensors, file.name)})
    ours = "model.language_model.layers.{layer}.cross_attn"
    (tmp_path / "map").write_text(
        "model.layers.{layer}.in_proj -> " + " + ".join(f"{ours}.{part}_proj.weight" for part in "qkv")
    )
    assert main(["convert", str(folder), str(tmp_path / "out"), "--map", str(tmp_path / "map")]) == 0
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(source))
