"""Synthetic originals are inspected, mapped and converted; what does not fit or must not be trusted is refused."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from casa_engine.checkpoint_cli import main
from casa_engine.checkpoints import load_model, load_processor
from casa_engine.errors import CheckpointError
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.originals.map_file import read_maps
from casa_engine.originals.plan import Plan, make_plan
from casa_engine.originals.rules import Rule
from casa_engine.originals.snapshot import read_snapshot
from casa_engine.originals.views import resolve_checkpoint
from casa_engine.weight_files import INDEX
from originals import (
    FAMILIES,
    candidate_names,
    original_model,
    scrambled_names,
    write_json,
    write_original,
)

NORM = "model.norm.weight"


def logits(model) -> torch.Tensor:
    """Logits of a short text with an image, in float32."""
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "input_ids": torch.randint(3, 300, (1, 9), generator=generator),
        "pixel_values": torch.randn(16, 1176, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    if model.config.is_cross_attention:
        inputs["insertion_points"] = torch.tensor([[4]])
    else:
        inputs["input_ids"][0, 2:6] = model.config.image_token_id
    with torch.no_grad():
        return model.float()(**inputs).logits


def plan_of(folder: Path, *maps: Path) -> Plan:
    return make_plan(read_snapshot(folder), read_maps(maps))


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["documents"]["tokenizer.json"].update(vocabulary="x"), "tokenizer.json is of another kind"),
        (lambda c: c["documents"]["tokenizer.json"].update(added_tokens=5), "tokenizer.json is of another kind"),
        (lambda c: c["documents"]["tokenizer.json"].update(added_tokens=[5]), "added_tokens that are no pairs"),
        (lambda c: c["tensors"][0].__setitem__(0, "a\nlm_head.weight -> -"), "expected letters, digits and"),
        (lambda c: c["tensors"][0].__setitem__(0, 5), "a damaged headers file"),
        (lambda c: c.update(fingerprint="x\nlm_head.weight -> -"), "no SHA-256"),
    ],
)
def test_headers_files_of_strangers(original, tmp_path, change, words: str, capsys) -> None:
    headers = tmp_path / "headers.json"
    assert main(["inspect", str(original), "--headers-only", str(headers)]) == 0
    content = json.loads(headers.read_text())
    change(content)
    write_json(headers, content)
    assert main(["inspect", str(headers), "--proposals", str(tmp_path / "map")]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "map").exists()


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


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals") / "original"
    return write_original(original_model("helium"), "helium", folder, candidate_names("helium"))


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def edit_tensors(folder: Path, change) -> None:
    """Changes the last shard, and the index with it."""
    file = sorted(folder.glob("model-*.safetensors"))[-1]
    before = load_file(file)
    tensors = dict(before)
    change(tensors)
    save_file(tensors, file)
    content = json.loads((folder / INDEX).read_text())
    weight_map = {name: where for name, where in content["weight_map"].items() if name not in before}
    write_json(folder / INDEX, {"weight_map": weight_map | dict.fromkeys(tensors, file.name)})


def edit_json(folder: Path, name: str, **fields) -> None:
    path = folder / name
    write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | fields)


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def with_header(folder: Path, change) -> None:
    """Rewrites the header of the first shard as text."""
    content = first_shard(folder).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    text = change(header)
    text = (text if isinstance(text, str) else json.dumps(header)).encode()
    first_shard(folder).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def overlap(header: dict) -> None:
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second] = header[first] | {}


def escape(header: dict) -> None:
    name = next(name for name in header if name != "__metadata__")
    header["\x1b[2Jx\nlm_head.weight"] = header.pop(name)


def twice(header: dict) -> str:
    name = next(name for name in header if name != "__metadata__")
    return json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'


def huge_shape(header: dict) -> None:
    header[next(name for name in header if name != "__metadata__")]["shape"] = [2**39, 2**39, 2**39]


def nest(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def link_to_blobs(folder: Path, cache: str) -> None:
    """Puts a shard into a folder of blobs, as the hub's cache does."""
    blob = folder.parent / cache / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    shard = first_shard(folder)
    shard.rename(blob)
    shard.symlink_to(blob)


def set_nan(tensors: dict) -> None:
    tensors[NORM][5] = float("nan")


WRONG = {
    "missing": (lambda f: edit_tensors(f, lambda t: t.pop(NORM)), "nothing fills model.language_model.norm.weight"),
    "extra": (
        lambda f: edit_tensors(f, lambda t: t.update(stray=torch.zeros(2))),
        r"no place for stray \(2,\)",
    ),
    "misshapen": (
        lambda f: edit_tensors(f, lambda t: t.update({NORM: torch.zeros(3)})),
        r"model.norm.weight has shape \(3,\); model.language_model.norm.weight has \(64,\)",
    ),
    "filled twice": (
        lambda f: edit_tensors(f, lambda t: t.update({"llm.norm.weight": torch.zeros(64)})),
        "model.language_model.norm.weight is given twice: by llm.norm.weight and by model.norm.weight",
    ),
    "NaN": (lambda f: edit_tensors(f, set_nan), "model.norm.weight holds NaN or infinity"),
    "no family": (lambda f: edit_json(f, "config.json", model_type="x", architectures=[]), "family = NAME"),
    "no size": (
        lambda f: edit_json(f, "config.json", hidden_size=None, width=64),
        r"config.text_config.hidden_size <- FIELD.*width = 64",
    ),
    "impossible size": (lambda f: edit_json(f, "config.json", n_layers=10**9), "expected int, at most 512"),
    "size of another kind": (
        lambda f: edit_json(f, "config.json", hidden_size="64"),
        "text_config.hidden_size is '64'",
    ),
    "other layers": (lambda f: edit_json(f, "config.json", xa_layers=[1]), r"ca_layers is \[1\] by config.json"),
    "heads that do not fit": (lambda f: edit_json(f, "config.json", num_attention_heads=7), "makes no model|has shape"),
    "rotary positions of another kind": (
        lambda f: edit_json(f, "config.json", rope_scaling={"type": "yarn", "factor": 4}),
        "rope_scaling.type = 'yarn' is not understood: set config.rope_type in a map file",
    ),
    "another order": (
        lambda f: edit_json(f, "config.json", xa_order="first"),
        "xa_order = 'first' is not understood: set config.ca_placement",
    ),
    "tokens around an image": (
        lambda f: edit_json(f, "config.json", post_image_tokens=[300]),
        r"has not all of the tokens \[300\]",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
}
SEEN_BY_CONVERT_ALONE = ("NaN", "no tokenizer", "tokens around an image")
HOSTILE = {
    "code of another repository": (
        lambda f: edit_json(f, "config.json", auto_map={"AutoConfig": "evil/repo--c.C"}),
        "auto_map to 'evil/repo', another repository",
    ),
    "code in the tokenizer": (
        lambda f: edit_json(f, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil/repo--t.T", None]}),
        "auto_map to 'evil/repo'",
    ),
    "kernels of a hub": (
        lambda f: edit_json(f, "config.json", text_config={"_attn_implementation_internal": "evil/kernel"}),
        "_attn_implementation_internal 'evil/kernel', which transformers would fetch",
    ),
    "another configuration": (
        lambda f: edit_json(f, "config.json", configuration_files=["config.4.0.0.json"]),
        "has configuration_files, by which transformers reads another file",
    ),
    "adapter": (lambda f: edit_json(f, "adapter_config.json", base_model_name_or_path="evil/repo"), "an adapter names"),
    "pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b"\x80\x04."), "programs that run when they are read"),
    "pickle of a training": (lambda f: (f / "optimizer.PT").write_bytes(b"\x80\x04."), "optimizer.PT"),
    "link out of the folder": (lambda f: (f / "merges.txt").symlink_to("/etc/passwd"), "outside of the folder"),
    "link to blobs elsewhere": (lambda f: link_to_blobs(f, "elsewhere"), "outside of the folder"),
    "path in the index": (
        lambda f: write_json(f / INDEX, {"weight_map": {NORM: "../../x.safetensors"}}),
        "expected files of the folder itself",
    ),
    "huge header": (
        lambda f: first_shard(f).write_bytes((2**40).to_bytes(8, "little") + b"{}"),
        "its header should have 1099511627776 bytes",
    ),
    "large header": (lambda f: with_header(f, lambda h: " " * (33 << 20)), "expected at most 33554432"),
    "overlap": (lambda f: with_header(f, overlap), "overlaps the tensor before it"),
    "tensor twice": (lambda f: with_header(f, twice), "it names '.*' twice"),
    "control characters in a name": (lambda f: with_header(f, escape), "expected letters, digits and"),
    "huge shape": (lambda f: with_header(f, huge_shape), f"; expected {2 * 2 ** (3 * 39)} bytes"),
    "deep JSON": (nest, "cannot be read as JSON"),
}


@pytest.mark.parametrize("case", {**WRONG, **HOSTILE})
def test_refusals(copy, case: str, capsys) -> None:
    """One sentence, exit status 1, nothing written and nothing executed; the same by inspect where it sees it."""
    damage, words = (WRONG | HOSTILE)[case]
    damage(copy)
    assert main(["convert", str(copy), str(copy.parent / "out")]) == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("casa-checkpoint: ") and sentence.endswith(".")
    assert re.search(words, sentence), sentence
    assert not (copy.parent / "out").exists() and not (copy / "executed").exists()
    assert main(["inspect", str(copy)]) == (0 if case in SEEN_BY_CONVERT_ALONE else 1)


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


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "c.C"}}, "config.json has auto_map"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["t.T", None]}}, "tokenizer_config.json has auto_map"),
        ("config.json", {"configuration_files": ["config.4.0.0.json"]}, "has configuration_files"),
        ("config.json", {"_attn_implementation": "evil/kernel"}, "would fetch from a hub and run"),
        ("config.json", {"_attn_implementation": "sdpa|evil/kernel"}, "would fetch from a hub and run"),
        ("config.json", {"_attn_implementation": {"vision_config": "evil/kernel"}}, "would fetch from a hub and run"),
    ],
)
def test_checkpoints_of_our_own_form_name_no_code(original, tmp_path, file: str, fields: dict, words: str) -> None:
    assert main(["convert", str(original), str(tmp_path / "out")]) == 0
    edit_json(tmp_path / "out", file, **fields)
    for load in (load_model, load_processor, CasaForConditionalGeneration.from_pretrained):
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path / "out")
