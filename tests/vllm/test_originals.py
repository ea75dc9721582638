"""`vllm serve FOLDER` on an original: vLLM's configuration of the model is that of its view."""

from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

import casa_vllm
from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.presets import preset_config
from casa_engine.view_folder import is_view
from originals import FAMILIES, candidate_names, original_model, write_json, write_original


@pytest.mark.parametrize("family", FAMILIES)
def test_model_tokenizer_and_configuration(tmp_path, monkeypatch, family: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    casa_vllm.register()
    folder = write_original(original_model(family), family, tmp_path / "original", candidate_names(family))
    model = EngineArgs(model=str(folder), trust_remote_code=True).create_model_config()
    assert is_view(Path(model.model)) and model.tokenizer == model.model
    assert model.served_model_name == str(folder)
    assert (model.hf_config.model_type, model.hf_config.fusion) == ("casa", "ca")
    assert model.architectures == ["CasaForConditionalGeneration"]
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("kind", ["own form", "original"])
def test_code_of_a_tokenizer_is_refused_before_it_runs(tmp_path, monkeypatch, kind: str) -> None:
    """vLLM loads the tokenizer before it calls the config hook."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    casa_vllm.register()
    if kind == "original":
        write_original(original_model("helium"), "helium", tmp_path / "model", candidate_names("helium"))
    else:
        write_random_checkpoint(preset_config("tiny-llama"), tmp_path / "model")
    (tmp_path / "model" / "t.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\n")
    write_json(tmp_path / "model" / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["t.T", None]}})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json has auto_map"):
        EngineArgs(model=str(tmp_path / "model"), trust_remote_code=True).create_model_config()
    assert not (tmp_path / "executed").exists()
