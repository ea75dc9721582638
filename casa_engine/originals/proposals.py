"""Proposes rules for tensors that no table knows: nearest by shape, number of layers and words of the name.

Names are compared a block at a time: `blocks.7.attn.wq` is one of `blocks.{layer}.attn.wq`, which all have one shape.
A proposal is never applied by itself: it is printed, or written to a map file for its reader to check.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from casa_engine.originals.layer_names import split_layer
from casa_engine.originals.rules import PROPOSED, Rule
from casa_engine.weight_files import Shapes

# Words of one meaning, as codebases write them.
SYNONYMS = {
    "query": ("q", "wq", "to", "tq", "queries"),
    "key": ("k", "wk", "keys"),
    "value": ("v", "wv", "values"),
    "output": ("o", "wo", "out", "c"),
    "gate": ("w1", "gating", "g"),
    "up": ("w3", "wi", "fc1"),
    "down": ("w2", "fc2", "dn"),
    "attention": ("attn", "self", "sa", "att", "mha", "selfattn", "attentions"),
    "cross": ("casa", "ca", "xa", "xattn", "crossattn", "image", "img", "vision"),
    "visual": ("vit", "tower", "vis", "encoder", "enc", "eye"),
    "mlp": ("ffn", "ff", "feed", "forward", "feedforward"),
    "norm": ("ln", "layernorm", "rmsnorm", "rms", "norms"),
    "input": ("pre", "in", "first", "before", "attnnorm"),
    "post": ("ffnnorm", "second", "after"),
    "embed": ("emb", "embedding", "embeddings", "tok", "tokens", "wte", "vocab"),
    "head": ("lm", "unembed", "logits", "classifier"),
    "layers": ("layer", "blocks", "block", "blk", "h"),
    "weight": ("w", "scale", "gamma", "kernel"),
    "bias": ("b", "beta"),
    "projection": ("proj", "linear", "projector"),
    "model": ("language", "llm", "decoder", "transformer", "backbone", "net", "module", "text"),
}
MEANINGS = {word: meaning for meaning, words in SYNONYMS.items() for word in (meaning, *words)}
MIN_SCORE = 0.05


@dataclass(frozen=True)
class Group:
    """Tensors whose names differ in the number of their layer alone.

    Attributes:
        pattern: Their name, with `{layer}` for the number.
        shape: Of each.
        layers: The numbers; empty where the name has none.
    """

    pattern: str
    shape: tuple[int, ...]
    layers: frozenset[int]


def groups(shapes: Shapes) -> list[Group]:
    """Group tensors by the first number of their names."""
    found: dict[tuple[str, tuple[int, ...]], set[int]] = defaultdict(set)
    for name, shape in shapes.items():
        pattern, layer = split_layer(name)
        found[pattern, shape].update(set() if layer is None else {layer})
    return [Group(pattern, shape, frozenset(layers)) for (pattern, shape), layers in found.items()]


def propose(leftovers: Shapes, missing: Shapes) -> list[Rule]:
    """Propose a place for groups of leftover tensors, the surest first.

    Args:
        leftovers: Stored tensors without a place.
        missing: Our tensors that nothing fills.
    """
    theirs, ours = groups(leftovers), groups(missing)
    scores = _scores(theirs, ours)
    taken: set[Group] = set()
    rules = []
    for (one, other), _ in sorted(scores.items(), key=lambda item: (-item[1], item[0][0].pattern, item[0][1].pattern)):
        if one not in taken and other not in taken:
            taken |= {one, other}
            rules.append(Rule(one.pattern, other.pattern, PROPOSED, "a proposal"))
    return rules


def nearest(name: str, shape: tuple[int, ...], candidates: Shapes, count: int = 3) -> list[str]:
    """Return the candidates of the same shape whose names are nearest, the nearest first."""
    same = {other: other_shape for other, other_shape in candidates.items() if other_shape == shape}
    weights = _weights([_words(name), *map(_words, same)])
    return sorted(same, key=lambda other: -_similarity(_words(name), _words(other), weights))[:count]


def _scores(theirs: list[Group], ours: list[Group]) -> dict[tuple[Group, Group], float]:
    """Similarity of every pair that may belong together: the same shape, and layers that ours has."""
    weights = _weights([_words(group.pattern) for group in (*theirs, *ours)])
    by_shape = defaultdict(list)
    for group in ours:
        by_shape[group.shape].append(group)
    scores = {}
    for one in theirs:
        for other in by_shape[one.shape]:
            if bool(one.layers) == bool(other.layers) and one.layers <= other.layers:
                score = MIN_SCORE + _similarity(_words(one.pattern), _words(other.pattern), weights)
                scores[one, other] = score + (0.3 if one.layers == other.layers else 0)
    return scores


def _words(name: str) -> Counter[str]:
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name.replace("{layer}", " "))
    words = [word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word]
    return Counter(MEANINGS.get(word, MEANINGS.get(word.rstrip("0123456789"), word)) for word in words)


def _weights(documents: Iterable[Counter[str]]) -> Mapping[str, float]:
    """Rare words tell more than common ones."""
    documents = list(documents)
    counts = Counter(word for words in documents for word in words)
    return {word: 1 + math.log(len(documents) / count) for word, count in counts.items()}


def _similarity(one: Counter[str], other: Counter[str], weights: Mapping[str, float]) -> float:
    """Cosine of the two names' words, from 0 to 1."""
    dot = sum(min(one[word], 2) * min(other[word], 2) * weights[word] ** 2 for word in one.keys() & other.keys())
    sizes = [sum((min(count, 2) * weights[word]) ** 2 for word, count in words.items()) for words in (one, other)]
    return dot / math.sqrt(sizes[0] * sizes[1]) if all(sizes) else 0.0
