"""How an original becomes a checkpoint of ours: family, configuration, and a place for each tensor."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casa_engine.configuration import CasaConfig
from casa_engine.errors import CheckpointError
from casa_engine.originals.assignment import Assignment, assign, unused
from casa_engine.originals.field_tables import OPEN
from casa_engine.originals.fields import CHOSEN, Value, build_config, misunderstood, read_fields, unread_fields
from casa_engine.originals.layer_names import split_layer
from casa_engine.originals.map_file import UserMap
from casa_engine.originals.proposals import nearest, propose
from casa_engine.originals.rules import GIVEN, KNOWN, UNVERIFIED, Rule
from casa_engine.originals.snapshot import TOKENIZER, Snapshot
from casa_engine.originals.templates import CHAT_TEMPLATE, template_value
from casa_engine.originals.tensor_tables import FAMILIES, HELIUM, QWEN, rules_of
from casa_engine.strict_weights import model_shapes
from casa_engine.tokenization import IMAGE
from casa_engine.weight_files import Shapes

TENSORS = "the tensors"
SHOWN = 4
# A few seconds' work; a published model has some thousand tensors.
MAX_COMPARISONS = 10_000_000
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# Every part that a checkpoint may have: what its tensors fill decides which it has.
WIDEST = {"fusion": "ca", "ca_weights": "own", "ca_placement": "parallel", "ca_layers": None, "image_norm": True}


@dataclass(frozen=True)
class Plan:
    """What is known of an original, and what it becomes.

    Attributes:
        snapshot: The original.
        family: One of `tensor_tables.FAMILIES`.
        values: Fields by name.
        config: Our configuration.
        assignment: Of the original's tensors.
        widest: Our tensors if every optional part were there, by shape.
        misunderstood: A sentence for each field of the original whose value is not understood.
        unread: Name and value of each field of the original that nothing reads.
        maps: The map files that were applied.
        proposals: Rules that were proposed, where that was asked for; part of `assignment`.
    """

    snapshot: Snapshot
    family: str
    values: Mapping[str, Value]
    config: CasaConfig
    assignment: Assignment
    widest: Mapping[str, tuple[int, ...]]
    misunderstood: tuple[str, ...]
    unread: tuple[tuple[str, Any], ...]
    maps: tuple[Path, ...]
    proposals: tuple[Rule, ...]

    @property
    def open_values(self) -> list[Value]:
        """Fields that the original's files do not tell and no map sets."""
        return [value for value in self.values.values() if value.status == OPEN]

    @property
    def unverified_values(self) -> list[Value]:
        """Fields that were taken from candidates, or follow from names of which nobody is sure."""
        return [value for value in self.values.values() if value.status == UNVERIFIED]

    @property
    def unverified_tensors(self) -> list[str]:
        """Stored tensors whose place is that of a candidate."""
        return [name for name, rule in self.assignment.rules.items() if rule.status == UNVERIFIED]

    def check(self) -> None:
        """Raise CheckpointError unless all is understood, every tensor used once and every parameter filled."""
        assignment = self.assignment
        if assignment.is_complete and not self.misunderstood:
            return
        kinds = (self.misunderstood, assignment.problems, assignment.leftovers, assignment.missing)
        count = sum(map(len, kinds))
        # The nearest of ours are looked for of those alone that are shown.
        problems = [*self.misunderstood, *assignment.problems]
        problems += [self._leftover(name) for name in assignment.leftovers[: max(SHOWN - len(problems), 0)]]
        problems += [f"nothing fills {name} {self.widest[name]}" for name in assignment.missing]
        more = f"; and {count - SHOWN} more" if count > SHOWN else ""
        raise CheckpointError(
            f"{self.snapshot.path} does not fit the {self.family} family: {'; '.join(problems[:SHOWN])}{more}. "
            "`casa checkpoint inspect` lists all of it, with --proposals FILE as a map file to correct."
        )

    def _leftover(self, name: str) -> str:
        shape = self.snapshot.tensors[name].shape
        near = nearest(name, shape, {ours: self.widest[ours] for ours in self.unfilled()})
        hint = f" (nearest: {', '.join(near)})" if near else ""
        return f"no place for {name} {shape}{hint}"

    def unfilled(self) -> list[str]:
        """Our tensors that nothing fills, those of optional parts that it may have included."""
        filled = {part.name for parts in self.assignment.parts.values() for part in parts}
        return [name for name in self.widest if name not in filled]


def make_plan(snapshot: Snapshot, user: UserMap | None = None, with_proposals: bool = False) -> Plan:
    """Make the plan of an original.

    Args:
        snapshot: Of its folder, or of a headers file.
        user: What map files say.
        with_proposals: Whether tensors without a place take the one that is proposed for them.

    Raises:
        CheckpointError: The family is not known; its configuration makes no model; the map has a rule that is about no
            tensor. Whether the tensors fit is for `Plan.check` to say.
    """
    user = UserMap() if user is None else user
    if len(user.rules) * len(snapshot.tensors) > MAX_COMPARISONS:
        raise CheckpointError(
            f"{snapshot.path} has {len(snapshot.tensors)} tensors, which {len(user.rules)} of its map's lines are too "
            f"many for; expected at most {MAX_COMPARISONS // len(snapshot.tensors)}. Say {{layer}} in place of numbers."
        )
    if mistaken := unused(user.rules, snapshot.tensors):
        rule = mistaken[0]
        raise CheckpointError(f"{rule.origin}: {rule.source!r} is the name of no tensor of {snapshot.path}.")
    family = user.family or detect_family(snapshot)
    values = read_fields(snapshot, family, user)
    widest = _shapes(build_config(values, family, **WIDEST, tie_word_embeddings=False))
    rules, proposals = user.rules + rules_of(family), ()
    parts = assign(snapshot.tensors, rules, widest)
    if with_proposals:
        leftovers = {name: snapshot.shapes[name] for name in parts.leftovers}
        proposals = tuple(propose(leftovers, {name: widest[name] for name in parts.missing}))
        rules += proposals
        parts = assign(snapshot.tensors, rules, widest)
    values |= _structure(snapshot, parts, values)
    values[CHAT_TEMPLATE] = template_value(snapshot.documents, values["image_token_id"].value)
    config = build_config(values, family, source_fingerprint=snapshot.fingerprint, **_dtype(snapshot))
    if not config.is_cross_attention and config.image_token_id >= config.text_config.vocab_size:
        raise CheckpointError(
            f"{snapshot.path}: its tokenizer has no {IMAGE}, and the model takes image tokens as text. Set "
            "config.image_token_id in a map file to the id that stands for an image token."
        )
    assignment = assign(snapshot.tensors, rules, _shapes(config))
    return Plan(
        snapshot,
        family,
        values,
        config,
        assignment,
        widest,
        misunderstood=tuple(misunderstood(snapshot, user)),
        unread=tuple(unread_fields(snapshot, user)),
        maps=user.paths,
        proposals=proposals,
    )


def _dtype(snapshot: Snapshot) -> dict[str, str]:
    """The type in which most of the weights are stored, as a field of a configuration."""
    sizes: Counter[str] = Counter()
    for header in snapshot.tensors.values():
        sizes[header.dtype] += header.num_bytes
    (dtype, _), *_ = sizes.most_common(1) or [("", 0)]
    return {"dtype": DTYPES[dtype]} if dtype in DTYPES else {}


def _shapes(config: CasaConfig) -> Shapes:
    """Shapes of our model. Raises CheckpointError for a configuration whose parts do not fit together."""
    try:
        return model_shapes(config)
    except (RuntimeError, TypeError, ValueError, ArithmeticError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(f"the original's configuration makes no model: {reason}.") from error


def detect_family(snapshot: Snapshot) -> str:
    """Find the family by the names that the configuration gives itself and its text model.

    Raises:
        CheckpointError: They tell none, or both.
    """
    parts = [part.get("model_type") for part in snapshot.config.values() if isinstance(part, dict)]
    said = f"{_own_names(snapshot)} {parts}".lower()
    found = [family for family, words in ((HELIUM, ("helium", "llama")), (QWEN, ("qwen",))) if _any(words, said)]
    if len(found) > 1:  # a Helium model with Qwen's vision encoder names both
        named = str(snapshot.config.get("model_type")).lower()
        found = [family for family in found if family in named]
    if len(found) != 1:
        raise CheckpointError(
            f"{snapshot.path}: config.json has model_type {snapshot.config.get('model_type')!r}, of no known family. "
            f"Write `family = NAME` into a map file, with one of {', '.join(FAMILIES)}."
        )
    return found[0]


def _own_names(snapshot: Snapshot) -> str:
    """What the configuration calls itself, in lower case."""
    return " ".join(str(snapshot.config.get(name)) for name in ("model_type", "architectures", "_name_or_path")).lower()


def _any(words: Iterable[str], text: str) -> bool:
    return any(word in text for word in words)


def _structure(snapshot: Snapshot, parts: Assignment, values: Mapping[str, Value]) -> dict[str, Value]:
    """Fields that the tensors themselves decide, and `fusion`, which they decide in part."""
    filled = {part.name: name for name, of_tensor in parts.parts.items() for part in of_tensor}

    def value(name: str, what: Any, *needles: str) -> Value:
        rules = [parts.rules[theirs] for ours, theirs in filled.items() if needles and needles[0] in ours]
        sure = all(rule.status in (KNOWN, GIVEN) for rule in rules)
        return Value(name, what, TENSORS, KNOWN if sure else UNVERIFIED)

    found = {}
    if "image_norm" not in values:
        found["image_norm"] = value("image_norm", "model.image_norm.weight" in filled, "image_norm")
    if "tie_word_embeddings" not in values:
        found["tie_word_embeddings"] = value("tie_word_embeddings", "lm_head.weight" not in filled)
    num_layers = values["text_config.num_hidden_layers"].value
    with_ca, with_sa = _layers(filled, ".cross_attn."), _layers(filled, ".self_attn.")
    if with_ca:
        layers = None if len(with_ca) == num_layers else sorted(with_ca)
        found["ca_weights"] = value("ca_weights", "own", ".cross_attn.")
        found["ca_layers"] = value("ca_layers", layers, ".cross_attn.")
        replaced = with_sa and not with_ca & with_sa
        found["ca_placement"] = value("ca_placement", "replace" if replaced else "parallel", ".cross_attn.")
    found |= _fusion(snapshot, values, bool(with_ca))
    fusion = found["fusion"] if "fusion" in found else values["fusion"]
    if not with_ca and "ca_layers" not in values and fusion.value != "insertion":
        found["ca_layers"] = Value("ca_layers", None, f"{CHOSEN}: every layer", OPEN)
    if "image_token_id" not in values:
        found["image_token_id"] = _marker(snapshot)
    for name, structure in found.items():
        _check_agreement(values.get(name), structure, num_layers)
    return {name: structure for name, structure in found.items() if values.get(name, structure).status != GIVEN}


def _layers(filled: Iterable[str], needle: str) -> set[int]:
    return {split_layer(name)[1] for name in filled if needle in name}


def _fusion(snapshot: Snapshot, values: Mapping[str, Value], has_ca: bool) -> dict[str, Value]:
    """`fusion`, and `ca_weights` where no tensor is cross-attention's own."""
    names = _own_names(snapshot)
    found = {}
    if not has_ca and "ca_weights" not in values:
        found["ca_weights"] = Value("ca_weights", "shared", "no tensor of cross-attention", UNVERIFIED)
    if "fusion" in values and values["fusion"].status != OPEN:
        return found
    if not has_ca and "casa" not in names:
        return {"fusion": Value("fusion", "insertion", "no tensor of cross-attention, no CASA in the name", UNVERIFIED)}
    if "livecc" in f"{names} {_folder_name(snapshot.path)}":
        # The paper says it of this model; of the others it says nothing.
        return found | {"fusion": Value("fusion", "ca_tv", "the name, and the paper", UNVERIFIED)}
    return found | {"fusion": Value("fusion", "ca", "this engine's choice of ca and ca_tv", OPEN)}


def _marker(snapshot: Snapshot) -> Value:
    """Id of the image marker: the tokenizer's, or the next free one, which a CASA model never sees."""
    tokenizer = snapshot.documents.get(TOKENIZER, {})
    rows = [row for row in tokenizer.get("added_tokens", []) if isinstance(row, list) and len(row) == 2]
    ids = {str(content): token_id for token_id, content in rows if type(token_id) is int}
    if IMAGE in ids:
        return Value("image_token_id", ids[IMAGE], f"{TOKENIZER}: {IMAGE}", KNOWN)
    free = max([int(tokenizer.get("vocabulary", 0)), *(token_id + 1 for token_id in ids.values())])
    return Value("image_token_id", free, "a marker of this engine's, behind the tokenizer's last id", OPEN)


def _folder_name(path: Path) -> str:
    """A folder's name in lower case; in the hub's cache, that of its repository."""
    path = path.absolute()
    return (path.parent.parent if path.parent.name == "snapshots" else path).name.lower()


def _check_agreement(said: Value | None, structure: Value, num_layers: int) -> None:
    """Raise CheckpointError if the configuration says otherwise than the tensors."""
    if said is None or said.status in (OPEN, GIVEN) or structure.origin != TENSORS:
        return
    same = said.value == structure.value
    if structure.name == "ca_layers":
        every = list(range(num_layers))
        same = sorted(said.value or every) == (structure.value or every)
    if not same:
        raise CheckpointError(
            f"{structure.name} is {said.value!r} by {said.origin} and {structure.value or 'all'!r} by the tensors. Set "
            f"config.{structure.name} in a map file."
        )
