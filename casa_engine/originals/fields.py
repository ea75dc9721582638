"""Fills our configuration from an original's, field by field, each with where it is from and how sure that is.

Only what a table names is copied: nothing else of the original's configuration reaches transformers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from casa_engine.configuration import CasaConfig
from casa_engine.errors import CheckpointError
from casa_engine.originals.field_tables import (
    CASA,
    CHOICES,
    MISSING,
    OPEN,
    PROCESSING,
    TEXT,
    TEXT_KINDS,
    UNREAD,
    VISION,
    Field,
)
from casa_engine.originals.map_file import UserMap
from casa_engine.originals.rules import GIVEN
from casa_engine.originals.snapshot import CONFIG, GENERATION, TOKENIZER_CONFIG, Snapshot
from casa_engine.originals.tensor_tables import QWEN

FIELDS = (*TEXT, *VISION, *CASA, *PROCESSING)
NOT_UNDERSTOOD = object()
CHOSEN = "this engine's choice"
# More than any model of the kind has, so that a wrong number costs nothing.
LIMITS = {
    **dict.fromkeys(("num_hidden_layers", "depth"), 512),
    **dict.fromkeys(("vocab_size", "bos_token_id", "pad_token_id", "eos_token_id", "image_token_id"), 1 << 22),
    **dict.fromkeys(("pre_image_tokens", "post_image_tokens"), 1 << 22),
    **dict.fromkeys(("max_position_embeddings", "min_pixels"), 1 << 24),
    "rope_theta": 1e12,
}
MAX_SIZE, MAX_LENGTH = 1 << 17, 4096
# Kinds of values that are not whole numbers.
KINDS: dict[str, type] = {
    **dict.fromkeys(("hidden_act", "fusion", "ca_placement", "ca_weights", "image_rope", "rope_type"), str),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "normalize_image_tokens"), bool),
    **dict.fromkeys(("image_norm", "bos_in_prompts", "do_sample"), bool),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "image_mean", "image_std"), float),
    **dict.fromkeys(("temperature", "top_p", "top_k", "repetition_penalty"), float),
}
MAY_BE_ONE = {"eos_token_id"}
LISTS = MAY_BE_ONE | {"fullatt_block_indexes", "mrope_section", "pre_image_tokens", "post_image_tokens", "ca_layers"}
LISTS |= {"image_mean", "image_std"}
PASSED_OVER = {
    "architectures",
    "auto_map",
    "dtype",
    "initializer_range",
    "model_type",
    "out_hidden_size",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "_from_model_config",
    "_name_or_path",
    # Of a tokenizer: its tokens, which tokenizer.json has, and classes.
    "added_tokens_decoder",
    "additional_special_tokens",
    "bos_token",
    "chat_template",
    "eos_token",
    "extra_special_tokens",
    "pad_token",
    "tokenizer_class",
    "unk_token",
}
# Those that are looked through for fields that nothing reads.
LOOKED_THROUGH = (CONFIG, GENERATION, "preprocessor_config.json", "processor_config.json", TOKENIZER_CONFIG)


@dataclass(frozen=True)
class Value:
    """One field's value.

    Attributes:
        name: The field's dotted name.
        value: For our configuration, processor or tokenizer.
        origin: Where it is from.
        status: `known`, `unverified`, `given` (by a map file) or `open`.
    """

    name: str
    value: Any
    origin: str
    status: str


def read_fields(snapshot: Snapshot, family: str, user: UserMap) -> dict[str, Value]:
    """Return what the original's files and the map say, and this engine's choice for the rest.

    Raises:
        CheckpointError: A field without which no tensor's shape is known is nowhere, or has an impossible value; or
            the map names a field that does not exist.
    """
    if unknown := sorted((user.values.keys() | user.sources.keys()) - {field.name for field in FIELDS}):
        raise CheckpointError(
            f"the map sets config.{unknown[0]}, which is no field; expected one of "
            f"{', '.join(sorted(field.name for field in FIELDS))}."
        )
    found = {field.name: _find(field, snapshot, user) for field in FIELDS}
    values = {name: value for name, value in found.items() if value is not None}
    if lacking := [field for field in FIELDS if field.decides_shapes and field.name not in values]:
        rest = ", ".join(f"{path} = {value}" for path, value in unread_fields(snapshot, user) if type(value) is int)
        raise CheckpointError(
            f"{snapshot.path}: config.json has no {lacking[0].name}. Write `config.{lacking[0].name} <- FIELD` into a "
            f"map file; what it has and nothing reads: {rest or 'no number'}."
        )
    values = {name: value for name, value in values.items() if value.value is not NOT_UNDERSTOOD}
    for name, value in CHOICES[family].items():
        values.setdefault(name, Value(name, value, CHOSEN, OPEN))
    for value in values.values():
        _check_kind(value)
    return values


def misunderstood(snapshot: Snapshot, user: UserMap) -> list[str]:
    """Return a sentence for each field that is there with a value whose meaning is not known."""
    found = [_find(field, snapshot, user) for field in FIELDS]
    return [
        f"{value.origin} is not understood: set config.{value.name} in a map file"
        for value in found
        if value is not None and value.value is NOT_UNDERSTOOD
    ]


def unread_fields(snapshot: Snapshot, user: UserMap) -> list[tuple[str, Any]]:
    """Names and values of fields that nothing reads, dotted as places are (see `field_tables`)."""
    places = {place for field in FIELDS for place, _ in field.places}
    places |= set(user.sources.values())
    found = []
    for document in LOOKED_THROUGH:
        prefix = "" if document == CONFIG else f"{document}:"
        for path, value in _leaves(snapshot.documents.get(document, {}), ""):
            name = path.rpartition(".")[2]
            if name in UNREAD or (f"{prefix}{path}" not in places and name not in PASSED_OVER):
                found.append((f"{prefix}{path}", value))
    return found


def build_config(values: Mapping[str, Value], family: str, **fields: Any) -> CasaConfig:
    """Build our configuration.

    Args:
        values: Of `read_fields`.
        family: Name of the family.
        **fields: Fields that replace those of the values.

    Raises:
        CheckpointError: The values contradict each other.
    """
    text = {name.partition(".")[2]: value.value for name, value in values.items() if name.startswith("text_config.")}
    vision = {name.partition(".")[2]: one.value for name, one in values.items() if name.startswith("vision_config.")}
    theta, text["model_type"] = text.pop("rope_theta"), TEXT_KINDS[family]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    if family == QWEN:  # Qwen2's configuration has no such fields
        text = {name: value for name, value in text.items() if name not in ("attention_bias", "mlp_bias", "head_dim")}
    vision["out_hidden_size"] = text["hidden_size"]
    ours = {field.name for field in CASA if "." not in field.name} - {"rope_type"}
    own = {name: value.value for name, value in values.items() if name in ours} | fields
    try:
        return CasaConfig(text_config=text, vision_config=vision, architectures=["CasaForConditionalGeneration"], **own)
    except Exception as error:  # transformers' own checks raise classes of another library's
        reason = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(f"the original's configuration makes no model: {reason}.") from error


def _find(field: Field, snapshot: Snapshot, user: UserMap) -> Value | None:
    if field.name in user.values:
        return Value(field.name, user.values[field.name], "the map file", GIVEN)
    places = field.places
    if field.name in user.sources:
        places = ((user.sources[field.name], GIVEN),)
    for place, status in places:
        value = _look_up(snapshot, place)
        if value is MISSING or value is None:
            if status == GIVEN:
                raise CheckpointError(f"the map takes config.{field.name} from {place}, which is nowhere.")
            continue
        origin = place if ":" in place else f"{CONFIG}: {place}"
        if field.meaning:
            known = value in field.meaning if isinstance(value, (str, bool)) else False
            if not known:
                return Value(field.name, NOT_UNDERSTOOD, f"{origin} = {value!r}", OPEN)
            value = field.meaning[value]
        if field.name == "ca_layers" and not _is_layer_list(value):
            return Value(field.name, NOT_UNDERSTOOD, f"{origin} = {value!r}", OPEN)
        return Value(field.name, value, origin, status)
    return None


def _is_layer_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _look_up(snapshot: Snapshot, place: str) -> Any:
    document, _, path = place.rpartition(":")
    value = snapshot.documents.get(document or CONFIG, MISSING)
    for part in path.split("."):
        value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
    return value


def _leaves(document: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        here = f"{path}{name}"
        if isinstance(value, dict) and name not in PASSED_OVER and here.count(".") < 4:
            yield from _leaves(value, f"{here}.")
        else:
            yield here, value


def _check_kind(value: Value) -> None:
    """Raise CheckpointError for values of another kind or size than models have, before anything is made of them."""
    part, _, name = value.name.rpartition(".")
    kind, limit = KINDS.get(name, int), LIMITS.get(name, MAX_SIZE)
    is_size = bool(part) and kind is int and name not in LISTS and not name.endswith("token_id")
    values = value.value if isinstance(value.value, list) and name in LISTS else [value.value]
    if value.value is None:
        return
    if name in LISTS - MAY_BE_ONE and not isinstance(value.value, list):
        good = False
    elif kind in (int, float):
        numbers = (int,) if kind is int else (int, float)
        good = all(type(each) in numbers and (1 if is_size else -1) <= each <= limit for each in values)
    else:
        good = all(type(each) is kind for each in values)
    if not good or len(values) > MAX_LENGTH:
        expected = f"{kind.__name__}, at most {limit}" if kind in (int, float) else kind.__name__
        expected = f"a list of {expected}" if name in LISTS else expected
        raise CheckpointError(f"config.{value.name} is {repr(value.value)[:60]} ({value.origin}); expected {expected}.")
