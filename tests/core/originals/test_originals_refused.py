"""Originals that do not fit or must not be trusted are refused with one sentence, nothing written, nothing run."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from casa_engine.checkpoint_cli import main
from casa_engine.checkpoints import load_model, load_processor
from casa_engine.errors import CheckpointError
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.weight_files import INDEX
from originals import edit_json, write_json

NORM = "model.norm.weight"


def edit_tensors(folder: Path, change) -> None:
    """Change the last shard, and the index with it."""
    file = sorted(folder.glob("model-*.safetensors"))[-1]
    before = load_file(file)
    tensors = dict(before)
    change(tensors)
    save_file(tensors, file)
    content = json.loads((folder / INDEX).read_text())
    weight_map = {name: where for name, where in content["weight_map"].items() if name not in before}
    write_json(folder / INDEX, {"weight_map": weight_map | dict.fromkeys(tensors, file.name)})


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def with_header(folder: Path, change) -> None:
    """Rewrite the header of the first shard as text."""
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
    """Put a shard into a folder of blobs, as the hub's cache does."""
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
