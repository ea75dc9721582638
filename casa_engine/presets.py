"""Configurations with the dimensions of the published models, and tiny ones for tests.

Dimensions and their sources stand in `docs/checkpoints.md`. What no public source tells (special ids, delimiters)
is chosen here and marked as such; a real checkpoint's own config always wins.
"""

from collections.abc import Callable
from typing import Any

from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from casa_engine.configuration import CasaConfig
from casa_engine.errors import ConfigError

QWEN_IDS = {"image_token_id": 151655, "pre_image_tokens": [151652], "post_image_tokens": [151653]}
# Helium's ids for an image's surroundings are not public (two text tokens a frame are); these are the last of its
# vocabulary, chosen by us.
HELIUM_IDS = {"image_token_id": 63997, "pre_image_tokens": [63998], "post_image_tokens": [63999]}
QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "out_hidden_size": 2048,
    "tokens_per_second": 2,
}


def _helium(**fields: Any) -> CasaConfig:
    text = LlamaConfig(
        vocab_size=64000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-8,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=3,
    )
    return CasaConfig(text_config=text, vision_config=dict(QWEN_VISION), **(HELIUM_IDS | fields))


def _qwen(**fields: Any) -> CasaConfig:
    text = Qwen2Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=128000,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=151643,
        eos_token_id=151645,
        pad_token_id=151643,
    )
    shape = {"mrope_section": [16, 24, 24], "tie_word_embeddings": True, "image_rope": "grid"}
    return CasaConfig(text_config=text, vision_config=dict(QWEN_VISION), **(QWEN_IDS | shape | fields))


TINY_TEXT = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
TINY_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 64,
    "initializer_range": 0.1,
}
TINY_IDS = {"image_token_id": 381, "pre_image_tokens": [382], "post_image_tokens": [383]}


def _tiny_llama(**fields: Any) -> CasaConfig:
    return CasaConfig(text_config=LlamaConfig(**TINY_TEXT), vision_config=dict(TINY_VISION), **(TINY_IDS | fields))


def _tiny_qwen(**fields: Any) -> CasaConfig:
    shape = {"mrope_section": [4, 6, 6], "tie_word_embeddings": True, "image_rope": "grid"}
    return CasaConfig(
        text_config=Qwen2Config(**TINY_TEXT),
        vision_config=dict(TINY_VISION),
        **(TINY_IDS | shape | fields),
    )


def _tiny_qwen3(**fields: Any) -> CasaConfig:
    # As in the real ones the heads together are wider than the hidden states.
    text = Qwen3Config(**TINY_TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32})
    return CasaConfig(text_config=text, vision_config=dict(TINY_VISION), **(TINY_IDS | fields))


# Which published checkpoints are `ca` and which `ca_tv` is not stated; the paper's main model is `ca`.
PRESETS: dict[str, tuple[Callable[..., CasaConfig], dict[str, Any]]] = {
    "CASA-Helium1-VL-2B": (_helium, {"fusion": "ca"}),
    "CASA-Helium1-VL-2B-Shared": (_helium, {"fusion": "ca", "ca_weights": "shared"}),
    "Helium1-VL-2B": (_helium, {"fusion": "insertion"}),
    "CASA-Qwen2_5-VL-3B": (_qwen, {"fusion": "ca"}),
    "CASA-Qwen2_5-VL-3B-Shared": (_qwen, {"fusion": "ca", "ca_weights": "shared"}),
    "CASA-Qwen2_5-VL-3B-LiveCC": (_qwen, {"fusion": "ca_tv"}),
    "tiny-llama": (_tiny_llama, {}),
    "tiny-qwen": (_tiny_qwen, {}),
    "tiny-qwen3": (_tiny_qwen3, {}),
}


def preset_config(name: str, **fields: Any) -> CasaConfig:
    """Return the configuration of a preset.

    Args:
        name: One of `PRESETS`.
        **fields: Fields of `CasaConfig` to set otherwise, such as `fusion`.

    Raises:
        ConfigError: No preset has that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; expected one of {', '.join(PRESETS)}.")
    build, defaults = PRESETS[name]
    return build(**(defaults | fields))
