"""The shape of casa-tiny-digits, and how its weights start."""

import copy
import math

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from casa_digits.data import CELL_PX, MAX_COLUMNS, MAX_ROWS
from casa_digits.tower import MERGE, PATCH_PX
from casa_engine.configuration import CasaConfig
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.processing_casa import CasaProcessor
from casa_engine.tokenization import IMAGE, IMAGE_END, IMAGE_START, TURN_END, chat_template

HIDDEN = 128
VOCABULARY_ROWS = 512
MAX_POSITIONS = 4096
# Of stage 3: a layer of stage 2, or a new one.
DEEPER = (0, None, 1, None, 2)


def vision_config() -> Qwen2_5_VLVisionConfig:
    """Return three blocks: one attends within a 28-px cell (which digit?), two to the whole image (which order?)."""
    return Qwen2_5_VLVisionConfig(
        depth=3,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_heads=4,
        patch_size=PATCH_PX,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=CELL_PX,
        fullatt_block_indexes=[1, 2],
        out_hidden_size=HIDDEN,
        initializer_range=0.05,
    )


def text_config(end_id: int, pad_id: int) -> Qwen2Config:
    """Return three layers, as stage 2 trains them; the vocabulary has some unused rows at its end."""
    return Qwen2Config(
        vocab_size=VOCABULARY_ROWS,
        hidden_size=HIDDEN,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )


def cosine_filters(count: int) -> torch.Tensor:
    """Return the `count` lowest two-dimensional cosine waves on a patch, (count, 14, 14), each of unit length."""
    steps = (torch.arange(PATCH_PX) + 0.5) * math.pi / PATCH_PX
    waves = torch.stack([torch.cos(steps * frequency) for frequency in range(PATCH_PX)])
    waves = waves / waves.norm(dim=1, keepdim=True)
    pairs = sorted(
        ((row, column) for row in range(PATCH_PX) for column in range(PATCH_PX)), key=lambda pair: (sum(pair), pair)
    )
    return torch.stack([torch.outer(waves[row], waves[column]) for row, column in pairs[:count]])


@torch.no_grad()
def init_with_cosines(tower: Qwen2_5_VisionTransformerPretrainedModel, share: float = 0.75) -> None:
    """Initialise most patch filters as smooth grey waves: pen strokes are smooth, so learning starts further on.

    Mutates:
        tower: its patch embedding.
    """
    weight = tower.patch_embed.proj.weight
    count = int(weight.shape[0] * share)
    waves = cosine_filters(count) / (2 * 3)
    weight[:count] = waves[:, None, None].expand(-1, 3, 2, -1, -1)


def casa_config(tokenizer: PreTrainedTokenizerFast) -> CasaConfig:
    """Return CA_t+v in every layer, in parallel with its own weights; Qwen2.5-VL's kind of backbone and delimiters."""
    image, before, after, end = tokenizer.convert_tokens_to_ids([IMAGE, IMAGE_START, IMAGE_END, TURN_END])
    return CasaConfig(
        text_config=text_config(end, tokenizer.pad_token_id),
        vision_config=vision_config(),
        fusion="ca_tv",
        ca_weights="own",
        image_rope="grid",
        mrope_section=[4, 6, 6],
        image_token_id=image,
        pre_image_tokens=[before],
        post_image_tokens=[after],
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> CasaProcessor:
    """Build it so that images up to 8x4 cells keep their size; larger ones, a screenshot, are shrunk to fit."""
    images = Qwen2VLImageProcessorPil(
        min_pixels=CELL_PX**2, max_pixels=MAX_ROWS * MAX_COLUMNS * CELL_PX**2, patch_size=PATCH_PX, merge_size=MERGE
    )
    return CasaProcessor(images, tokenizer, chat_template=chat_template())


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> CasaForConditionalGeneration:
    """Build the untrained model.

    Mutates:
        torch's global generator: it is seeded, and what is drawn next, the head of stage 1, follows from the seed too.
    """
    torch.manual_seed(seed)
    model = CasaForConditionalGeneration(casa_config(tokenizer))
    init_with_cosines(model.model.visual)
    return model


@torch.no_grad()
def deepen(model: CasaForConditionalGeneration, seed: int) -> CasaForConditionalGeneration:
    """Return a model of the layers `DEEPER` that computes the same: what the new layers add is zero at first.

    torch's global generator is as before: a model may be made for its size alone.
    """
    config = copy.deepcopy(model.config)
    config.text_config.num_hidden_layers = len(DEEPER)
    config.text_config.layer_types = ["full_attention"] * len(DEEPER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        deeper = CasaForConditionalGeneration(config)
    shallow, deep = model.model.language_model, deeper.model.language_model
    for layer, source in zip(deep.layers, DEEPER, strict=True):
        if source is not None:
            layer.load_state_dict(shallow.layers[source].state_dict())
            continue
        for output in (layer.self_attn.o_proj, layer.cross_attn.o_proj, layer.mlp.down_proj):
            output.weight.zero_()
    deep.embed_tokens.load_state_dict(shallow.embed_tokens.state_dict())
    deep.norm.load_state_dict(shallow.norm.state_dict())
    deeper.lm_head.load_state_dict(model.lm_head.state_dict())
    deeper.model.visual.load_state_dict(model.model.visual.state_dict())
    return deeper
