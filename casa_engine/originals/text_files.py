"""Tokenizer, chat template, image processing and generation defaults of a converted original.

Built from the original's tokenizer.json and the plan's fields; neither its own processor nor any class that its
configurations name is used. What nobody outside has seen (delimiters of turns, where Helium puts what) is chosen here.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import GENERATION_CONFIG_NAME

from casa_engine.errors import CheckpointError
from casa_engine.json_files import read_object
from casa_engine.originals.plan import Plan
from casa_engine.originals.snapshot import TOKENIZER
from casa_engine.originals.templates import CHAT_TEMPLATE, OWN, own_template
from casa_engine.originals.tensor_tables import QWEN
from casa_engine.processing_casa import CasaProcessor
from casa_engine.token_ids import list_token_ids
from casa_engine.tokenization import IMAGE, chat_template

GENERATION_FIELDS = ("temperature", "top_p", "top_k", "repetition_penalty", "do_sample")
QWEN_IMAGE = '"<|vision_start|><|image_pad|><|vision_end|>"'  # in our own template
# Turns of Helium's chats have "minimal delimiters" by the paper; which, nobody outside knows: a line each here.
HELIUM_TEMPLATE = """\
{{- BOS -}}
{%- for message in messages -%}
{%- if message.content is string -%}{{- message.content -}}
{%- elif message.content -%}
{%- for item in message.content -%}
{%- if item.type in ["image", "image_url"] -%}{{- IMAGE -}}
{%- elif item.type == "text" -%}{{- item.text -}}
{%- else -%}{{- raise_exception("unknown content type '" ~ item.type ~ "'; expected text or image") -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- "\\n" -}}
{%- endfor -%}
"""


def write_text_files(plan: Plan, folder: Path) -> None:
    """Write tokenizer, template, processor and generation_config.json.

    Raises:
        CheckpointError: The original's tokenizer cannot be read.
    """
    build_processor(plan).save_pretrained(folder)
    text = plan.config.text_config
    content = {"eos_token_id": text.eos_token_id, "pad_token_id": text.pad_token_id}
    content |= {name: plan.values[name].value for name in GENERATION_FIELDS if name in plan.values}
    (folder / GENERATION_CONFIG_NAME).write_text(
        json.dumps({name: value for name, value in content.items() if value is not None}, indent=2) + "\n"
    )


def build_processor(plan: Plan) -> CasaProcessor:
    """Build our processor for an original.

    Raises:
        CheckpointError: Its tokenizer is missing or cannot be read.
    """
    tokenizer = _tokenizer(plan)
    vision, values = plan.config.vision_config, plan.values
    images = Qwen2VLImageProcessorPil(
        min_pixels=values["min_pixels"].value,
        max_pixels=values["image_size"].value ** 2,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        image_mean=values["image_mean"].value,
        image_std=values["image_std"].value,
    )
    marker = tokenizer.convert_ids_to_tokens(plan.config.image_token_id)
    return CasaProcessor(
        images,
        tokenizer,
        chat_template=template_of(plan, tokenizer, marker),
        fusion=plan.config.fusion,
        image_token=marker,
    )


def template_of(plan: Plan, tokenizer: PreTrainedTokenizerFast, marker: str) -> str:
    """The original's own template where the plan says so, otherwise its family's here."""
    own = own_template(plan.snapshot.documents)
    if own is not None and plan.values[CHAT_TEMPLATE].value == OWN:
        return own[1]
    config = plan.config
    image = json.dumps(_text(tokenizer, config.pre_image_tokens) + marker + _text(tokenizer, config.post_image_tokens))
    bos = config.text_config.bos_token_id if plan.values["bos_in_prompts"].value else None
    first = json.dumps(tokenizer.convert_ids_to_tokens(bos) or "" if bos is not None else "")
    if plan.family == QWEN:
        return (f"{{{{- {first} -}}}}\n" if bos is not None else "") + chat_template().replace(QWEN_IMAGE, image)
    return HELIUM_TEMPLATE.replace("BOS", first).replace("IMAGE", image)


def _text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Text of the tokens around an image. Raises CheckpointError for ids that the tokenizer does not have."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if None in tokens:
        raise CheckpointError(
            f"its tokenizer has not all of the tokens {ids} that stand around an image. Set config.pre_image_tokens "
            "and config.post_image_tokens in a map file."
        )
    return "".join(tokens)


def _tokenizer(plan: Plan) -> PreTrainedTokenizerFast:
    path = plan.snapshot.path / TOKENIZER
    if not path.is_file():
        raise CheckpointError(f"{plan.snapshot.path} has no {TOKENIZER}; expected a fast tokenizer's file.")
    content, config = read_object(path), plan.config
    _add_marker(content, config.image_token_id)
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:
        raise CheckpointError(f"{path} is no tokenizer: {error}.") from error
    if tokenizer.id_to_token(config.image_token_id) is None:
        raise CheckpointError(
            f"{path} has no token {config.image_token_id}, the image marker. Set config.image_token_id in a map file."
        )
    ends = list_token_ids(config.text_config.eos_token_id)
    end = tokenizer.id_to_token(ends[0]) if ends else None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        bos_token=_token(tokenizer, config.text_config.bos_token_id),
        pad_token=_token(tokenizer, config.text_config.pad_token_id) or end,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=config.text_config.max_position_embeddings,
    )


def _add_marker(content: dict[str, Any], marker_id: int) -> None:
    """Add our image marker to a tokenizer whose id for it is free. Mutates `content`."""
    vocabulary, added = (content.get("model") or {}).get("vocab"), content.get("added_tokens")
    if not isinstance(vocabulary, (dict, list)) or not isinstance(added, list):
        return
    taken = set(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
    if marker_id in taken or any(isinstance(token, dict) and token.get("id") == marker_id for token in added):
        return
    if isinstance(vocabulary, dict):  # a list's ids are its indices: an added token behind the last has the next
        vocabulary[IMAGE] = marker_id
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added.append({"id": marker_id, "content": IMAGE, "special": True, **flags})


def _token(tokenizer: Tokenizer, token_id: Any) -> str | None:
    return tokenizer.id_to_token(token_id) if type(token_id) is int else None
