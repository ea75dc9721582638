"""CasaConfig: round trip, derived properties, refusals; presets have the published dimensions."""

import pytest
import torch
from transformers import AutoConfig, GPT2Config

from casa_engine.configuration import CasaConfig
from casa_engine.errors import ConfigError
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.presets import PRESETS, preset_config

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_auto_config(name: str, tmp_path) -> None:
    config = preset_config(name)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, CasaConfig)
    expected = config.to_dict() | {"_name_or_path": str(tmp_path)}
    assert again.to_dict() | {"_name_or_path": str(tmp_path)} == expected


def test_layers() -> None:
    config = preset_config("tiny-qwen", ca_placement="replace", ca_layers=[2, 0])
    assert config.cross_attention_layers == [0, 2]
    assert [config.has_sa(layer) for layer in range(3)] == [False, True, False]
    assert preset_config("tiny-qwen", fusion="insertion").cross_attention_layers == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fusion": "gated"}, "fusion is 'gated'; expected one of ca, ca_tv, insertion"),
        ({"ca_weights": "none"}, "ca_weights is 'none'; expected one of"),
        ({"ca_placement": "after"}, "ca_placement is 'after'; expected one of"),
        ({"ca_layers": [0, 3]}, r"layers \[3\]; the backbone has layers 0 to 2"),
        ({"ca_placement": "replace", "ca_weights": "shared", "ca_layers": [0]}, "no self-attention to share"),
        ({"ca_placement": "replace"}, "leaves no self-attention"),
        ({"mrope_section": [4, 4, 4]}, "with the sum 16"),
        ({"mrope_section": None}, "image_rope 'grid' needs mrope_section"),
        ({"vision_config": {"out_hidden_size": 32}}, "expected the backbone's hidden_size, 64"),
        ({"text_config": {"model_type": "gpt2"}}, "expected one of llama, qwen2"),
        ({"text_config": {"model_type": "qwen3", "use_sliding_window": True}}, "has layers of sliding_attention"),
        (
            {"text_config": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}},
            "rope_type 'yarn'; expected one of default, linear, llama3",
        ),
        ({"text_config": "qwen3"}, "text_config is a str; expected one of LlamaConfig"),
        ({"text_config": GPT2Config()}, "text_config is a GPT2Config; expected one of LlamaConfig, Qwen2Config"),
    ],
)
def test_contradictions_are_refused(fields: dict, words: str) -> None:
    base = preset_config("tiny-qwen").to_dict()
    with pytest.raises(ConfigError, match=words):
        CasaConfig(**(base | fields))


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="no preset 'big'"):
        preset_config("big")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        # Paper and scripts: own CA weights add 352.3 M (Helium) and 339.8 M (Qwen) parameters to the shared variants.
        ("CASA-Helium1-VL-2B", (2.5, 3.2)),
        ("CASA-Qwen2_5-VL-3B", (3.9, 4.3)),
    ],
)
def test_presets_have_the_published_sizes(name: str, billions: tuple[float, float]) -> None:
    with torch.device("meta"):
        own = CasaForConditionalGeneration(preset_config(name)).num_parameters()
        shared = CasaForConditionalGeneration(preset_config(f"{name}-Shared")).num_parameters()
    assert billions[0] < own / 1e9 < billions[1]
    expected = {"CASA-Helium1-VL-2B": 352.3, "CASA-Qwen2_5-VL-3B": 339.8}[name]
    assert (own - shared) / 1e6 == pytest.approx(expected, abs=0.1)
