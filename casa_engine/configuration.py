"""`CasaConfig`: one configuration for every CASA fusion, placement and backbone.

Each decision that the paper (arXiv 2512.19535) leaves open is one field here or one place in `windows.py`;
`docs/configuration.md` lists them. The backbone is a stock transformers config of a kind that `backbones.py` lists.
"""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from casa_engine.backbones import Backbone, backbone_of, build_text_config
from casa_engine.errors import ConfigError
from casa_engine.guarded_loading import GuardedConfig

FUSIONS = ("ca", "ca_tv", "insertion")
CA_WEIGHTS = ("own", "shared")
CA_PLACEMENTS = ("parallel", "replace")
IMAGE_ROPES = ("frozen", "grid")


class CasaConfig(GuardedConfig, PreTrainedConfig):
    """Configuration of a CASA vision-language model.

    Attributes:
        text_config: Backbone, a configuration of one of `casa_engine.backbones` (or a dict of one).
        vision_config: Vision encoder of Qwen2.5-VL; its `out_hidden_size` is the backbone's `hidden_size`.
        fusion: How images reach the text. `ca`: each text token attends to the images of its window (paper Eq. 2).
            `ca_tv`: to the images and, causally, to the text of its window (Eq. 4). `insertion`: image tokens are
            in the text stream (the baseline).
        ca_weights: `own`: each CA layer has projections of its own. `shared`: CA uses those of self-attention (D1).
        ca_placement: `parallel`: CA is added to self-attention. `replace`: CA replaces it (D3).
        ca_layers: Decoder layers that have CA; None means all.
        normalize_image_tokens: Whether a block's input norm is applied to image tokens before its CA keys and values.
        image_norm: Whether an RMSNorm of its own stands between vision encoder and decoder, as in other models of
            CASA's authors; none of the published checkpoints is known to have one.
        image_rope: Rotary position of image tokens in `ca_tv`. `frozen`: all at the insertion point. `grid`: temporal
            coordinate frozen, height and width count rows and columns from it (M-RoPE backbones only).
        image_position_offset: Position of an image relative to the first token of its window: 0 at it, -1 before it.
        mrope_section: Rotary frequencies (half head size) per temporal, height and width axis; None without M-RoPE.
        image_token_id: Marks an image in a prompt. In the CA fusions it never reaches the model.
        pre_image_tokens: Ids that the template writes before an image; they belong to the window before.
        post_image_tokens: Ids that the template writes after an image; the first of its window ("gist" tokens).
        tie_word_embeddings: Whether the output layer is the embedding table.
        source_fingerprint: Of the published checkpoint that it was converted from (`casa_engine.originals`).

    Raises:
        ConfigError: A field has a value outside its set, or two fields contradict each other.
    """

    model_type = "casa"
    sub_configs: ClassVar = {"text_config": AutoConfig, "vision_config": Qwen2_5_VLVisionConfig}
    keys_to_ignore_at_inference: ClassVar = ["cache", "past_key_values"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    fusion: str = "ca_tv"
    ca_weights: str = "own"
    ca_placement: str = "parallel"
    ca_layers: list[int] | None = None
    normalize_image_tokens: bool = True
    image_norm: bool = False
    image_rope: str = "frozen"
    image_position_offset: int = 0
    mrope_section: list[int] | None = None
    image_token_id: int = 0
    pre_image_tokens: list[int] | None = None
    post_image_tokens: list[int] | None = None
    tie_word_embeddings: bool = False
    source_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = build_text_config(self.text_config)
        if not isinstance(self.vision_config, PreTrainedConfig):
            defaults = {"out_hidden_size": self.text_config.hidden_size}
            self.vision_config = Qwen2_5_VLVisionConfig(**(defaults | (self.vision_config or {})))
        self.pre_image_tokens = list(self.pre_image_tokens or [])
        self.post_image_tokens = list(self.post_image_tokens or [])
        self.text_config.tie_word_embeddings = self.tie_word_embeddings
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for field, allowed in (
            ("fusion", FUSIONS),
            ("ca_weights", CA_WEIGHTS),
            ("ca_placement", CA_PLACEMENTS),
            ("image_rope", IMAGE_ROPES),
        ):
            if getattr(self, field) not in allowed:
                raise ConfigError(f"{field} is {getattr(self, field)!r}; expected one of {', '.join(allowed)}.")
        num_layers = self.text_config.num_hidden_layers
        bad = [layer for layer in self.ca_layers or [] if not 0 <= layer < num_layers]
        if bad:
            raise ConfigError(f"ca_layers names layers {bad}; the backbone has layers 0 to {num_layers - 1}.")
        if self.ca_placement == "replace" and self.ca_weights == "shared":
            raise ConfigError(
                "ca_placement 'replace' with ca_weights 'shared': a replaced layer has no self-attention to share "
                "weights with; use ca_weights 'own'."
            )
        if (
            self.ca_placement == "replace"
            and self.fusion != "insertion"
            and len(self.cross_attention_layers) == num_layers
        ):
            raise ConfigError(
                "ca_placement 'replace' in every layer leaves no self-attention; list the replaced layers in ca_layers."
            )
        if self.vision_config.out_hidden_size != self.text_config.hidden_size:
            raise ConfigError(
                f"vision_config.out_hidden_size is {self.vision_config.out_hidden_size}; expected the backbone's "
                f"hidden_size, {self.text_config.hidden_size}."
            )
        half = self.head_dim // 2
        if self.mrope_section is not None and (len(self.mrope_section) != 3 or sum(self.mrope_section) != half):
            raise ConfigError(f"mrope_section is {self.mrope_section}; expected three numbers with the sum {half}.")
        if self.image_rope == "grid" and self.mrope_section is None:
            raise ConfigError("image_rope 'grid' needs mrope_section; without M-RoPE use image_rope 'frozen'.")

    @property
    def backbone(self) -> Backbone:
        """The kind of decoder that `text_config` describes."""
        return backbone_of(self.text_config)

    @property
    def head_dim(self) -> int:
        """Size of one attention head of the backbone."""
        text = self.text_config
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    @property
    def qkv_bias(self) -> bool:
        """Whether query, key and value projections have a bias."""
        fixed = self.backbone.qkv_bias
        return self.text_config.attention_bias if fixed is None else fixed

    @property
    def output_bias(self) -> bool:
        """Whether the attention output projection has a bias."""
        fixed = self.backbone.output_bias
        return self.text_config.attention_bias if fixed is None else fixed

    @property
    def mlp_bias(self) -> bool:
        """Whether the projections of the MLPs have a bias."""
        fixed = self.backbone.mlp_bias
        return self.text_config.mlp_bias if fixed is None else fixed

    @property
    def is_cross_attention(self) -> bool:
        """Whether images stay out of the text stream (`ca` and `ca_tv`)."""
        return self.fusion != "insertion"

    @property
    def sees_window_text(self) -> bool:
        """Whether CA keys include the window's text (`ca_tv`)."""
        return self.fusion == "ca_tv"

    @property
    def cross_attention_layers(self) -> list[int]:
        """Decoder layers that have CA, ascending; empty for `insertion`."""
        if not self.is_cross_attention:
            return []
        return sorted(set(range(self.text_config.num_hidden_layers) if self.ca_layers is None else self.ca_layers))

    def has_ca(self, layer: int) -> bool:
        """Return whether decoder layer `layer` has CA."""
        return layer in self.cross_attention_layers

    def has_sa(self, layer: int) -> bool:
        """Return whether decoder layer `layer` has self-attention."""
        return self.ca_placement == "parallel" or not self.has_ca(layer)
