"""`vllm serve FOLDER` on an original: vLLM's configuration of the model is that of its view."""

from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

import casa_vllm
from casa_engine.view_folder import is_view
from originals import FAMILIES, candidate_names, original_model, write_original


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
