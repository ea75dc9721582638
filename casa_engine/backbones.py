"""The text decoders that CASA can be built on: everything in which they differ, one entry each.

Eager model, vLLM plugin and export look it up here and never compare names of backbones. To add one, write its entry
here and a preset (`presets.py`); `docs/checkpoints.md`, "Adding a backbone", lists what follows by itself.
"""

from dataclasses import dataclass

from torch import nn
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding

from casa_engine.errors import ConfigError


@dataclass(frozen=True)
class Backbone:
    """One kind of text decoder: pre-norm blocks of rotary attention and a gated MLP.

    A bias of None is a choice of the checkpoint: the configuration's own field decides.

    Attributes:
        config_class: Its configuration; the `model_type` names the backbone in a checkpoint's `text_config`.
        mlp_class: Built from the configuration.
        norm_class: Built from a size and `eps`; norms of blocks, the final one and those of queries and keys.
        rotary_class: Built from the configuration; gives `inv_freq`, the frequencies of half-split rotation.
        has_qk_norm: Whether each head of queries and keys is normed before it is rotated.
        qkv_bias: Whether query, key and value projections have a bias; None: `attention_bias` decides.
        output_bias: Whether the output projection of attention has one; None: `attention_bias` decides.
        mlp_bias: Whether the MLP's projections have one; None: `mlp_bias` decides.
    """

    config_class: type[PreTrainedConfig]
    mlp_class: type[nn.Module]
    norm_class: type[nn.Module]
    rotary_class: type[nn.Module]
    has_qk_norm: bool
    qkv_bias: bool | None
    output_bias: bool | None
    mlp_bias: bool | None


BACKBONES = {
    backbone.config_class.model_type: backbone
    for backbone in (
        # Helium-1's kind.
        Backbone(
            config_class=LlamaConfig,
            mlp_class=LlamaMLP,
            norm_class=LlamaRMSNorm,
            rotary_class=LlamaRotaryEmbedding,
            has_qk_norm=False,
            qkv_bias=None,
            output_bias=None,
            mlp_bias=None,
        ),
        # Qwen2.5-VL's kind: M-RoPE is not the backbone's but the model's (`CasaConfig.mrope_section`).
        Backbone(
            config_class=Qwen2Config,
            mlp_class=Qwen2MLP,
            norm_class=Qwen2RMSNorm,
            rotary_class=Qwen2RotaryEmbedding,
            has_qk_norm=False,
            qkv_bias=True,
            output_bias=False,
            mlp_bias=False,
        ),
        # The dense text decoders of Qwen3. No CASA model on one is published: that its norms of queries and keys are
        # part of CA's attention as well is decided here.
        Backbone(
            config_class=Qwen3Config,
            mlp_class=Qwen3MLP,
            norm_class=Qwen3RMSNorm,
            rotary_class=Qwen3RotaryEmbedding,
            has_qk_norm=True,
            qkv_bias=None,
            output_bias=None,
            mlp_bias=False,
        ),
    )
}
DEFAULT = LlamaConfig.model_type
# Angles that are a position times a frequency. Other types scale attention besides, or change with the text's length.
ROPE_TYPES = ("default", "linear", "llama3")


def backbone_of(config: PreTrainedConfig) -> Backbone:
    """Return the entry of a text configuration.

    Raises:
        ConfigError: It is of no kind in the table.
    """
    backbone = BACKBONES.get(getattr(config, "model_type", None))
    if backbone is None or not isinstance(config, backbone.config_class):
        expected = ", ".join(entry.config_class.__name__ for entry in BACKBONES.values())
        raise ConfigError(f"text_config is a {type(config).__name__}; expected one of {expected}.")
    return backbone


def build_text_config(value: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    """Return a backbone's configuration.

    Args:
        value: The configuration itself, or its fields (by `model_type`, a Llama without one); None for a default one.

    Raises:
        ConfigError: It is of no kind in the table, or has attention or rotary positions of another kind.
    """
    if value is None or isinstance(value, dict):
        fields = value or {}
        kind = fields.get("model_type", DEFAULT)
        if kind not in BACKBONES:
            raise ConfigError(f"text_config.model_type is {kind!r}; expected one of {', '.join(BACKBONES)}.")
        value = BACKBONES[kind].config_class(**fields)
    backbone_of(value)
    _check_attention(value)
    return value


def _check_attention(config: PreTrainedConfig) -> None:
    """Raise ConfigError unless every layer sees all earlier text, at positions that only rotate queries and keys."""
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if others:
        raise ConfigError(
            f"text_config has layers of {', '.join(sorted(others))}; expected full_attention in all: set "
            "use_sliding_window to false, if the model was trained without."
        )
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"text_config.rope_parameters has rope_type {rope_type!r}; expected one of {', '.join(ROPE_TYPES)}. "
            "M-RoPE is CasaConfig's own field, mrope_section."
        )
