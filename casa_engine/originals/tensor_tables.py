"""Names of tensors in the published checkpoints, by family: pattern there, name here, how sure that is.

Known are, from the public scripts, where the vision encoder is and that both its form and the backbone's are those of
Qwen2.5-VL, Llama and Qwen2 in transformers. Where the decoder stands and what cross-attention is called was never
seen: these rows are candidates. A row counts only where our model has the tensor that it gives; the first that does
wins, so what is more particular stands first.
"""

from casa_engine.originals.rules import KNOWN, UNVERIFIED, Rule

HELIUM, QWEN = "helium", "qwen"
FAMILIES = (HELIUM, QWEN)
LAYER = "model.language_model.layers.{layer}"
# Where a decoder may stand: a language model of transformers by itself, or below one of these names.
DECODERS = ("model.", "model.language_model.", "language_model.model.", "llm.model.", "llm.", "language_model.", "")
CROSS_ATTENTION = ("cross_attn", "cross_attention", "casa_attn", "casa", "ca", "xa", "self_attn.cross_attn")
SUFFIXES = ("casa", "ca", "xa", "cross", "img", "image")
# Norms between vision encoder and decoder, as in other models of the same authors.
IMAGE_NORMS = ("image_prefix.norm_extra", "image_prefix.norm_xa", "image_prefix.norm", "image_prefix.enc.norm_extra")
ENCODERS = {HELIUM: ("image_prefix.enc.visual",), QWEN: ("image_prefix.visual",)}


def _encoder(family: str) -> list[Rule]:
    known = [Rule(f"{place}.*", "model.visual.*", KNOWN) for place in ENCODERS[family]]
    others = [place for places in ENCODERS.values() for place in places if place not in ENCODERS[family]]
    others += [f"model.{place}" for places in ENCODERS.values() for place in places] + ["visual", "model.visual"]
    return known + [Rule(f"{place}.*", "model.visual.*") for place in others]


def _cross_attention(decoder: str) -> list[Rule]:
    block = f"{decoder}layers.{{layer}}"
    ours = f"{LAYER}.cross_attn.{{part}}_proj.*"
    rows = [Rule(f"{block}.self_attn.{{part}}_proj_{suffix}.*", ours) for suffix in SUFFIXES]
    rows += [Rule(f"{block}.self_attn.{suffix}_{{part}}_proj.*", ours) for suffix in SUFFIXES]
    return rows + [Rule(f"{block}.{name}.{{part}}_proj.*", ours) for name in CROSS_ATTENTION]


def _decoder(decoder: str) -> list[Rule]:
    block = f"{decoder}layers.{{layer}}"
    return [
        Rule(f"{block}.self_attn.{{part}}_proj.*", f"{LAYER}.self_attn.{{part}}_proj.*"),
        # The tail of transformers' Qwen2 and Llama blocks, whatever stands before it.
        Rule(f"{block}.mlp.*", f"{LAYER}.mlp.*"),
        Rule(f"{block}.input_layernorm.weight", f"{LAYER}.input_layernorm.weight"),
        Rule(f"{block}.post_attention_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight"),
        Rule(f"{decoder}embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        Rule(f"{decoder}norm.weight", "model.language_model.norm.weight"),
    ]


def rules_of(family: str) -> tuple[Rule, ...]:
    """The rows of a family, in the order in which they are tried."""
    rows = _encoder(family)
    for prefix in ("", "model."):
        rows += [Rule(f"{prefix}{name}.weight", "model.image_norm.weight", UNVERIFIED) for name in IMAGE_NORMS]
    for decoder in DECODERS:
        rows += _cross_attention(decoder)
    for decoder in DECODERS:
        rows += _decoder(decoder)
    rows += [Rule(name, "lm_head.weight") for name in ("lm_head.weight", "language_model.lm_head.weight")]
    rows += [Rule("llm.lm_head.weight", "lm_head.weight"), Rule("model.lm_head.weight", "lm_head.weight")]
    # Frequencies follow from the configuration; older versions of transformers stored them.
    rows += [Rule("*.rotary_emb.inv_freq", "-"), Rule("*.rotary_pos_emb.inv_freq", "-")]
    return tuple(rows)
