"""Packages: checkpoints with their code, loaded by a process that has no casa_engine; and what one without says."""

import ast
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from casa_engine.checkpoint_cli import main
from casa_engine.checkpoints import load_model, load_processor, read_config, write_random_checkpoint
from casa_engine.code_package import package_sources
from casa_engine.errors import CheckpointError
from casa_engine.presets import preset_config
from casa_engine.processing_casa import CasaProcessor
from chats import picture, prepare, user

CHATS = [[user(picture(56, 84), "What?")], [user("And", picture(61, 50), "this, longer one?")]]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# Loads each package, answers CHATS, saves it and loads that; writes what it found.
PROGRAM = """
import json, sys
sys.modules["casa_engine"] = None  # importing it raises ModuleNotFoundError
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline

plain, out, *packages = sys.argv[1:]
TRUST = {"trust_remote_code": True}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
errors, arrays = {}, {}
for name, folder, options in (("plain", plain, {}), ("untrusted", packages[0], {"trust_remote_code": False})):
    for auto in (AutoModelForImageTextToText, AutoProcessor):
        try:
            auto.from_pretrained(folder, **options)
        except Exception as error:
            errors[f"{name} {auto.__name__}"] = str(error)
for index, package in enumerate(packages):
    model = AutoModelForImageTextToText.from_pretrained(package, **TRUST).eval()
    processor = AutoProcessor.from_pretrained(package, **TRUST)
    model.save_pretrained(f"{out}/saved{index}")
    again = AutoModelForCausalLM.from_pretrained(f"{out}/saved{index}", **TRUST).eval()
    chats = np.load(f"{out}/chats.npz")
    from PIL import Image
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": Image.fromarray(chats[f"picture{row}"])},
                                      {"type": "text", "text": str(chats[f"text{row}"])}]}] for row in range(2)]
    batch = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        arrays[f"logits{index}"] = model(**batch).logits.numpy()
        arrays[f"again{index}"] = again(**batch).logits.numpy()
    arrays[f"tokens{index}"] = model.generate(**batch, **GREEDY).numpy()
assert "casa_engine" not in [name for name, module in sys.modules.items() if module is not None]
np.savez(f"{out}/found.npz", **arrays)
print(json.dumps(errors))
"""
FUSIONS = ("ca_tv", "insertion")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint of each fusion, and its package, written by the command."""
    folder = tmp_path_factory.mktemp("packages")
    for fusion in FUSIONS:
        write_random_checkpoint(preset_config("tiny-qwen", fusion=fusion), folder / fusion)
        assert main(["package", str(folder / fusion), str(folder / f"package of {fusion}")]) == 0
    return folder


@pytest.fixture(scope="module")
def elsewhere(checkpoints):
    """What a process without casa_engine makes of them: its errors and its arrays."""
    pictures = {f"picture{row}": np.asarray(picture(56 + 28 * row, 84)) for row in range(2)}
    np.savez(checkpoints / "chats.npz", **pictures, text0="What?", text1="a longer question")
    packages = [str(checkpoints / f"package of {fusion}") for fusion in FUSIONS]
    command = [sys.executable, "-P", "-c", PROGRAM, str(checkpoints / FUSIONS[0]), str(checkpoints), *packages]
    # Not from a shell with a terminal, where transformers would ask; and with module and hub caches of its own.
    environment = os.environ | {"HF_HOME": str(checkpoints / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=checkpoints, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1]), np.load(checkpoints / "found.npz")


@pytest.mark.parametrize("index", range(len(FUSIONS)), ids=FUSIONS)
def test_a_package_answers_without_casa_engine(checkpoints, elsewhere, index: int) -> None:
    """Logits and tokens are the eager model's, also of the package that the loaded model saves."""
    found = elsewhere[1]
    model, processor = load_model(checkpoints / FUSIONS[index]), load_processor(checkpoints / FUSIONS[index])
    chats = [[user(picture(56 + 28 * row, 84), text)] for row, text in enumerate(("What?", "a longer question"))]
    batch = prepare(processor, chats)
    with torch.no_grad():
        expected = model(**batch).logits.numpy()
    np.testing.assert_allclose(found[f"logits{index}"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[f"again{index}"], expected, rtol=1e-5, atol=1e-5)
    assert found[f"tokens{index}"].tolist() == model.generate(**batch, **GREEDY).tolist()


def test_a_package_without_trust_says_what_to_do(elsewhere) -> None:
    for auto in ("AutoModelForImageTextToText", "AutoProcessor"):
        assert "trust_remote_code=True" in elsewhere[0][f"untrusted {auto}"]


def test_a_checkpoint_without_casa_engine_is_refused(elsewhere) -> None:
    """transformers' words, which docs/troubleshooting.md quotes: no file of the folder can change them."""
    assert "model type `casa`" in elsewhere[0]["plain AutoModelForImageTextToText"]


def test_a_package_is_never_run_by_casa_engine(checkpoints) -> None:
    package = checkpoints / f"package of {FUSIONS[0]}"
    for load in (load_model, load_processor, read_config):
        with pytest.raises(CheckpointError, match="auto_map, which names Python files"):
            load(package)


@pytest.mark.parametrize("trust", [True, False])
@pytest.mark.parametrize("auto", [AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText])
def test_auto_classes_refuse_a_package_beside_casa_engine(checkpoints, auto, trust: bool) -> None:
    with pytest.raises(CheckpointError, match="auto_map, which names Python files"):
        auto.from_pretrained(checkpoints / f"package of {FUSIONS[0]}", trust_remote_code=trust)


@pytest.mark.parametrize("trust", [True, False])
def test_the_processor_of_a_package_is_casa_engines_own(checkpoints, trust: bool) -> None:
    """Beside casa-engine: none of the folder's code is read."""
    before = set(sys.modules)
    processor = AutoProcessor.from_pretrained(checkpoints / f"package of {FUSIONS[0]}", trust_remote_code=trust)
    assert type(processor) is CasaProcessor
    assert not [name for name in set(sys.modules) - before if name.startswith("transformers_modules.")]


def test_the_code_of_a_package_imports_nothing_of_casa_engine() -> None:
    sources = package_sources()
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
                assert not node.level or f"{node.module}.py" in sources, name
            assert not [each for each in names if each.split(".")[0] == "casa_engine"], name
    assert "untrusted_folder.py" not in sources and "guarded_loading.py" in sources


def test_what_cannot_be_packaged(checkpoints, tmp_path, capsys) -> None:
    """A package itself, a folder without processor; and a package's folder is written again, a stranger's is not."""
    package = str(checkpoints / f"package of {FUSIONS[0]}")
    assert main(["package", package, str(tmp_path / "out")]) == 1
    assert "auto_map" in capsys.readouterr().err
    load_model(checkpoints / FUSIONS[0]).save_pretrained(tmp_path / "model")
    assert main(["package", str(tmp_path / "model"), str(tmp_path / "out")]) == 1
    assert "no processor_config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["package", str(checkpoints / FUSIONS[0]), package]) == 0
    assert main(["package", str(checkpoints / FUSIONS[0]), str(tmp_path / "model")]) == 1


@pytest.mark.parametrize("place", [".", "within", "..", "link"])
def test_a_package_never_takes_its_checkpoints_place(checkpoints, tmp_path, capsys, place: str) -> None:
    checkpoint = tmp_path / "folder" / "checkpoint"
    shutil.copytree(checkpoints / FUSIONS[0], checkpoint)
    (tmp_path / "link").symlink_to(checkpoint)
    output = tmp_path / "link" if place == "link" else checkpoint / place
    assert main(["package", str(checkpoint), str(output)]) == 1
    assert "are the same or within each other" in capsys.readouterr().err
    load_model(checkpoint)  # it would be refused as a package
    assert not (checkpoint / "within").exists() and os.listdir(checkpoint.parent) == ["checkpoint"]


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "NOTICE", "vocabulary.txt"])
def test_a_package_takes_a_checkpoints_own_texts_and_no_others(checkpoints, tmp_path, capsys, name: str) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(checkpoints / FUSIONS[0], checkpoint)
    (checkpoint / name).write_text("words of the checkpoint's owner")
    assert main(["package", str(checkpoint), str(tmp_path / "package")]) == 0
    assert (tmp_path / "package" / name).read_text() == "words of the checkpoint's owner"
    (tmp_path / "others").write_text("words of somebody else")
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to(tmp_path / "others")
    capsys.readouterr()
    assert main(["package", str(checkpoint), str(tmp_path / "second")]) == 1
    assert f"{name} is a symbolic link to {tmp_path / 'others'}" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()
