"""Fields of our configuration and where the published checkpoints may have them.

A place is a dotted name in config.json, or `document:dotted name`. Those of transformers' own configurations and the
few that the public scripts show are `known`; the others are candidates. Where nothing is found, the value is this
engine's own choice and called `open`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from casa_engine.originals.rules import KNOWN, UNVERIFIED
from casa_engine.originals.tensor_tables import HELIUM, QWEN
from casa_engine.presets import QWEN_IDS, QWEN_VISION

OPEN = "open"
MISSING = object()
TEXT_PLACES = ("text_config.", "llm_config.", "language_config.", "llm.", "")
VISION_PLACES = ("vision_config.", "image_encoder.", "visual.", "vision.")
PROCESSORS = ("processor_config.json:", "preprocessor_config.json:", "tokenizer_config.json:")


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
        name: In our configuration, dotted.
        places: Where it may be and how sure that is, in the order in which they are tried.
        meaning: Our values for theirs; empty where they are the same.
        decides_shapes: Whether tensors have another shape without it, so that there is no value to choose.
    """

    name: str
    places: tuple[tuple[str, str], ...]
    meaning: Mapping[Any, Any] = field(default_factory=dict)
    decides_shapes: bool = False


def _part(part: str, prefixes: tuple[str, ...], names: Mapping[str, tuple[str, ...]], shaping: set[str]) -> list[Field]:
    return [
        Field(
            f"{part}.{name}",
            tuple((f"{prefix}{each}", KNOWN) for prefix in prefixes for each in (name,))
            + tuple((f"{prefix}{each}", UNVERIFIED) for prefix in prefixes for each in others),
            decides_shapes=name in shaping,
        )
        for name, others in names.items()
    ]


def _candidates(*names: str, known: tuple[str, ...] = ()) -> tuple[tuple[str, str], ...]:
    return tuple((name, KNOWN) for name in known) + tuple((name, UNVERIFIED) for name in names)


TEXT = _part(
    "text_config",
    TEXT_PLACES,
    {
        "vocab_size": ("n_vocab", "card"),
        "hidden_size": ("d_model", "dim", "n_embd"),
        "intermediate_size": ("ffn_dim", "dim_feedforward", "hidden_dim"),
        "num_hidden_layers": ("num_layers", "n_layers", "n_layer", "depth"),
        "num_attention_heads": ("num_heads", "n_heads", "n_head"),
        "num_key_value_heads": ("num_kv_heads", "n_kv_heads", "kv_heads"),
        "head_dim": ("dim_head",),
        "max_position_embeddings": ("max_seq_len", "max_position"),
        "rms_norm_eps": ("norm_eps", "layer_norm_eps"),
        "hidden_act": ("hidden_activation",),
        "attention_bias": ("qkv_bias",),
        "mlp_bias": (),
        "rope_theta": ("rope_parameters.rope_theta", "rope_base", "max_period"),
        "bos_token_id": (),
        "pad_token_id": (),
    },
    {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"},
)
VISION = _part(
    "vision_config",
    VISION_PLACES,
    {
        "depth": ("num_hidden_layers",),
        "hidden_size": ("embed_dim",),
        "intermediate_size": ("ffn_dim",),
        "num_heads": ("num_attention_heads",),
        "in_channels": ("in_chans",),
        "patch_size": (),
        "temporal_patch_size": (),
        "spatial_merge_size": (),
        "window_size": (),
        "fullatt_block_indexes": (),
        "tokens_per_second": (),
        "hidden_act": (),
    },
    set(),
)
CASA = [
    Field("tie_word_embeddings", _candidates(known=tuple(f"{place}tie_word_embeddings" for place in TEXT_PLACES))),
    Field(
        "mrope_section",
        _candidates(
            known=tuple(
                f"{place}{name}.mrope_section" for place in TEXT_PLACES for name in ("rope_scaling", "rope_parameters")
            )
        ),
    ),
    Field(
        "rope_type",
        _candidates(
            known=tuple(
                f"{place}{name}"
                for place in TEXT_PLACES
                for name in ("rope_scaling.rope_type", "rope_scaling.type", "rope_parameters.rope_type")
            )
        ),
        {"default": "default", "mrope": "default"},
    ),
    Field("pre_image_tokens", _candidates(*(f"{p}pre_image_tokens" for p in PROCESSORS), known=("pre_image_tokens",))),
    Field(
        "post_image_tokens", _candidates(*(f"{p}post_image_tokens" for p in PROCESSORS), known=("post_image_tokens",))
    ),
    Field("image_token_id", _candidates("image_token_id", "image_token_index")),
    Field(
        "fusion",
        _candidates("casa_fusion", "fusion"),
        {"ca": "ca", "ca_tv": "ca_tv", "insertion": "insertion"},
    ),
    Field("ca_layers", _candidates("xa_layers", "casa_layers", "ca_layers", "cross_attention_layers")),
    Field(
        "ca_placement",
        _candidates("xa_order", "casa_order", "ca_placement"),
        {"parallel": "parallel", "replace": "replace", "instead": "replace"},
    ),
    Field(
        "ca_weights",
        _candidates("xa_shared", "casa_shared", "xa_share_weights", "ca_weights"),
        {True: "shared", False: "own", "shared": "shared", "own": "own"},
    ),
    Field("normalize_image_tokens", _candidates("xa_norm_on_images", "casa_norm_on_images", "norm_image_tokens")),
    Field("image_norm", ()),
    Field("image_rope", ()),
    Field("image_position_offset", ()),
    Field(
        "text_config.eos_token_id",
        _candidates(
            known=("generation_config.json:eos_token_id", *(f"{place}eos_token_id" for place in TEXT_PLACES)),
        ),
    ),
]
# Fields that may change what the model computes and whose meaning is not known: never read, always shown.
UNREAD = ("casa_windows", "xa_gating", "xa_conditional_gating", "xa_dim", "xa_start", "casa_delta", "xa_rope")

# Preprocessing and text, outside of our config.json: what is written for our processor and tokenizer.
PROCESSING = [
    Field("image_size", _candidates(*(f"{p}{n}" for p in (*PROCESSORS, "") for n in ("image_size", "img_size")))),
    Field("image_mean", _candidates(known=("preprocessor_config.json:image_mean", "processor_config.json:image_mean"))),
    Field("image_std", _candidates(known=("preprocessor_config.json:image_std", "processor_config.json:image_std"))),
    Field("min_pixels", _candidates(known=("preprocessor_config.json:min_pixels", "processor_config.json:min_pixels"))),
    Field("bos_in_prompts", _candidates("processor_config.json:add_bos_token", "tokenizer_config.json:add_bos_token")),
    Field("temperature", _candidates(known=("generation_config.json:temperature",))),
    Field("top_p", _candidates(known=("generation_config.json:top_p",))),
    Field("top_k", _candidates(known=("generation_config.json:top_k",))),
    Field("repetition_penalty", _candidates(known=("generation_config.json:repetition_penalty",))),
    Field("do_sample", _candidates(known=("generation_config.json:do_sample",))),
]

QWEN_MEAN = [0.48145466, 0.4578275, 0.40821073]
QWEN_STD = [0.26862954, 0.26130258, 0.27577711]
SHARED_CHOICES: dict[str, Any] = {
    **{f"vision_config.{name}": value for name, value in QWEN_VISION.items() if name != "out_hidden_size"},
    "vision_config.in_channels": 3,
    "vision_config.patch_size": 14,
    "vision_config.temporal_patch_size": 2,
    "vision_config.spatial_merge_size": 2,
    "vision_config.hidden_act": "silu",
    "text_config.hidden_act": "silu",
    "rope_type": "default",
    "ca_placement": "parallel",
    "normalize_image_tokens": True,
    "image_position_offset": 0,
    # The evaluation scripts' default; live captions are made with 448.
    "image_size": 896,
    "image_mean": QWEN_MEAN,
    "image_std": QWEN_STD,
    "min_pixels": 28 * 28,
}
# What this engine takes where the original says nothing; the numbers are those of the public backbones.
CHOICES: dict[str, dict[str, Any]] = {
    HELIUM: SHARED_CHOICES
    | {
        "text_config.num_attention_heads": 16,
        "text_config.num_key_value_heads": 8,
        "text_config.attention_bias": False,
        "text_config.mlp_bias": False,
        "text_config.max_position_embeddings": 4096,
        "text_config.rms_norm_eps": 1e-8,
        "text_config.rope_theta": 20000.0,
        "text_config.eos_token_id": 1,
        "text_config.bos_token_id": 0,
        "mrope_section": None,
        "image_rope": "frozen",
        "pre_image_tokens": [],
        "post_image_tokens": [],
        "bos_in_prompts": True,  # the live captioning script drops it after the first frame
    },
    QWEN: SHARED_CHOICES
    | {
        "text_config.num_attention_heads": 16,
        "text_config.num_key_value_heads": 2,
        "text_config.max_position_embeddings": 128000,
        "text_config.rms_norm_eps": 1e-6,
        "text_config.rope_theta": 1000000.0,
        "text_config.eos_token_id": 151645,
        "mrope_section": [16, 24, 24],
        "image_rope": "grid",
        "pre_image_tokens": QWEN_IDS["pre_image_tokens"],
        "post_image_tokens": QWEN_IDS["post_image_tokens"],
        "bos_in_prompts": False,
    },
}
TEXT_KINDS = {HELIUM: "llama", QWEN: "qwen2"}
