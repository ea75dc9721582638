"""Every backbone by itself is transformers' own language model of that kind."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from casa_engine.backbones import BACKBONES
from casa_engine.checkpoints import random_model
from casa_engine.configuration import CasaConfig
from casa_engine.presets import preset_config
from tiny_presets import TINY_PRESETS

IDS = torch.randint(3, 300, (2, 14), generator=torch.Generator().manual_seed(4))


def test_every_backbone_has_a_tiny_preset() -> None:
    assert sorted(preset_config(name).text_config.model_type for name in TINY_PRESETS) == sorted(BACKBONES)


@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("preset", TINY_PRESETS)
def test_text_alone_equals_transformers_own_model(preset: str, attention_bias: bool) -> None:
    """With biases where the checkpoint may choose them; a Qwen2 has the same ones whatever the field says."""
    config = preset_config(preset, fusion="insertion")
    text = config.text_config.to_dict() | {"attention_bias": attention_bias, "mlp_bias": attention_bias}
    model = random_model(CasaConfig(**(config.to_dict() | {"text_config": text})))
    own = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    own.load_state_dict(
        {
            name.replace("model.language_model.", "model."): tensor
            for name, tensor in model.state_dict().items()
            if not name.startswith("model.visual.")
        }
    )
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, own(IDS).logits, rtol=1e-5, atol=1e-5)
