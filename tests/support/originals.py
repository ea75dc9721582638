"""Synthetic originals: random tiny models saved as somebody else would name, cut and configure them.

None of this is a published checkpoint's own form, which nobody here has seen: `candidate_names` are those that the
engine's tables call unverified, `scrambled_names` are drawn by a seed from words that codebases use.
"""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from casa_engine.checkpoints import default_processor, random_model
from casa_engine.configuration import CasaConfig
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.originals.map_file import read_maps
from casa_engine.originals.plan import Plan, make_plan
from casa_engine.originals.snapshot import read_snapshot
from casa_engine.presets import preset_config
from casa_engine.tokenization import IMAGE

FAMILIES = {"helium": "tiny-llama", "qwen": "tiny-qwen"}
TYPES = {"helium": "CASA_Helium1_VL_2B", "qwen": "CASA_Qwen2_5_VL_3B"}
TOWERS = {"helium": "image_prefix.enc.visual", "qwen": "image_prefix.visual"}
VISION_FIELDS = ("depth", "hidden_size", "intermediate_size", "num_heads", "fullatt_block_indexes", "out_hidden_size")
Names = Callable[[str], str]


def candidate_names(family: str) -> Names:
    """Names as the tables have them."""

    def rename(name: str) -> str:
        name = name.replace("model.visual.", f"{TOWERS[family]}.").replace("model.language_model.", "model.")
        name = re.sub(r"cross_attn\.(\w)_proj", r"self_attn.\1_proj_casa", name)
        return name.replace("model.image_norm", "image_prefix.norm_extra")

    return rename


WORDS = {
    "model.language_model": ["llm.net", "backbone", "decoder.text"],
    "layers": ["blocks", "h", "blk"],
    "self_attn": ["attn", "sa", "mha"],
    "cross_attn": ["xattn", "casa", "cross"],
    "q_proj": ["wq", "query", "to_q"],
    "k_proj": ["wk", "key", "to_k"],
    "v_proj": ["wv", "value", "to_v"],
    "o_proj": ["wo", "out", "to_out"],
    "mlp": ["ffn", "feed_forward", "ff"],
    "gate_proj": ["w1", "gate", "gating"],
    "up_proj": ["w3", "up"],
    "down_proj": ["w2", "down"],
    "input_layernorm": ["pre_norm", "ln_in"],
    "post_attention_layernorm": ["post_norm", "norm_post"],
    "embed_tokens": ["tok_emb", "wte"],
    "visual": ["vision_tower", "enc.vit", "vis"],
}
# Names that say nothing: a person has to tell where these belong.
NONSENSE = {"model.language_model.norm": "zz.r7", "image_norm": "qy"}


def scrambled_names(seed: int) -> Names:
    """Names drawn from `WORDS`, behind a prefix of their own."""
    generator = random.Random(seed)
    words = {ours: generator.choice(theirs) for ours, theirs in WORDS.items()}
    prefix = f"m{generator.randrange(100)}."

    def rename(name: str) -> str:
        for ours, theirs in (NONSENSE | words).items():
            name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\1{theirs}", name)
        return prefix + name

    return rename


def original_model(family: str, seed: int = 0, **fields) -> CasaForConditionalGeneration:
    """A random tiny model of a family in bfloat16."""
    return random_model(preset_config(FAMILIES[family], **{"fusion": "ca", **fields}), seed, torch.bfloat16)


def write_original(
    model: CasaForConditionalGeneration, family: str, folder: Path, names: Names, shards: int = 3
) -> Path:
    """Write a model as an original: its own config, its own names, bfloat16 shards with an index, remote code."""
    folder.mkdir(parents=True)
    tensors = {names(name): tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop(names("lm_head.weight"))
    per_file = -(-len(tensors) // shards)
    weight_map = {}
    for number in range(shards):
        part = dict(list(tensors.items())[number * per_file : (number + 1) * per_file])
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in part.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", original_config(model.config, family))
    # Code that must never run, as originals have it.
    code = f"open({str(folder / 'executed')!r}, 'w').close()\n"
    for module in ("configuration_casa", "modeling_casa", "processing_casa"):
        (folder / f"{module}.py").write_text(code)
    processor = default_processor(model.config)
    processor.tokenizer.save_pretrained(folder)
    # The class that transformers 4 calls so; 5 writes a name which the originals' version does not know.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    write_json(folder / "processor_config.json", {"auto_map": {"AutoProcessor": "processing_casa.Processor"}})
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 257], "repetition_penalty": 1.05})
    if family == "helium":
        _forget_marker(folder / "tokenizer.json")
    return folder


def original_config(config: CasaConfig, family: str) -> dict:
    """A config.json with fields of other names, beside those of transformers."""
    text = config.text_config.to_dict()
    fields = {
        "model_type": TYPES[family],
        "architectures": [TYPES[family]],
        "auto_map": {"AutoConfig": "configuration_casa.Config", "AutoModel": "modeling_casa.Model"},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.3",
        "vision_config": {name: getattr(config.vision_config, name) for name in VISION_FIELDS},
        "pre_image_tokens": config.pre_image_tokens,
        "post_image_tokens": config.post_image_tokens,
        "xa_norm_on_images": config.normalize_image_tokens,
        "casa_windows": "images",
        "n_layers": text["num_hidden_layers"],
        "rope_base": text["rope_parameters"]["rope_theta"],
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if config.ca_layers is not None:
        fields["xa_layers"] = config.ca_layers
    if config.mrope_section is not None:
        fields["rope_scaling"] = {"type": "mrope", "mrope_section": config.mrope_section}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return fields | {name: text[name] for name in (*names, "max_position_embeddings", "rms_norm_eps")}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1))


def edit_json(folder: Path, name: str, **fields) -> None:
    path = folder / name
    write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | fields)


def plan_of(folder: Path, *maps: Path) -> Plan:
    return make_plan(read_snapshot(folder), read_maps(maps))


def logits(model) -> torch.Tensor:
    """Logits of a short text with an image, in float32."""
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "input_ids": torch.randint(3, 300, (1, 9), generator=generator),
        "pixel_values": torch.randn(16, 1176, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    if model.config.is_cross_attention:
        inputs["insertion_points"] = torch.tensor([[4]])
    else:
        inputs["input_ids"][0, 2:6] = model.config.image_token_id
    with torch.no_grad():
        return model.float()(**inputs).logits


def _forget_marker(path: Path) -> None:
    """Take our marker of an image out of a tokenizer: Helium's own has none."""
    content = json.loads(path.read_text())
    content["model"]["vocab"].pop(IMAGE, None)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != IMAGE]
    path.write_text(json.dumps(content))
