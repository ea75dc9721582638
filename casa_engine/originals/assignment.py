"""Assigns stored tensors to those of our model: each is used once, and each of ours is filled.

rules, in order -> the first that gives names of ours -> shapes -> who fills what, and what is left over
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from casa_engine.originals.rules import Rule
from casa_engine.safetensors_header import TensorHeader
from casa_engine.tensor_map import Part, TensorMap
from casa_engine.weight_files import Shapes


@dataclass(frozen=True)
class Assignment:
    """What each stored tensor becomes.

    Attributes:
        parts: Of stored tensors, by their names; those that are left out have none.
        rules: The rule that each of these follows.
        leftovers: Stored tensors that no rule gives a place.
        missing: Our tensors that nothing fills.
        problems: A sentence each for shapes that differ and tensors that are filled twice.
    """

    parts: dict[str, tuple[Part, ...]]
    rules: dict[str, Rule]
    leftovers: tuple[str, ...]
    missing: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every tensor is used once and every parameter filled."""
        return not (self.leftovers or self.missing or self.problems)

    @property
    def tensor_map(self) -> TensorMap:
        """The same as a checkpoint's tensor map."""
        return TensorMap(self.parts)


def assign(stored: Mapping[str, TensorHeader], rules: Sequence[Rule], expected: Shapes) -> Assignment:
    """Find a place for every stored tensor.

    Args:
        stored: What the checkpoint holds.
        rules: Tried in order; one counts only where it gives tensors that our model has, or leaves the tensor out.
        expected: What our model has.
    """
    parts: dict[str, tuple[Part, ...]] = {}
    followed: dict[str, Rule] = {}
    leftovers, problems = [], []
    filled: dict[str, str] = {}
    for name, header in stored.items():
        rule, targets = _first(name, rules, expected)
        if rule is None:
            leftovers.append(name)
            continue
        cut = _cut(header.shape, [(target, expected[target]) for target in targets])
        if cut is None:
            wanted = " + ".join(str(expected[target]) for target in targets)
            problems.append(f"{name} has shape {header.shape}; {' + '.join(targets)} has {wanted} ({rule.origin})")
            cut = tuple(Part(target) for target in targets)
        for part in cut:
            if part.name in filled:
                problems.append(f"{part.name} is given twice: by {filled[part.name]} and by {name}")
            filled[part.name] = name
        parts[name], followed[name] = cut, rule
    missing = tuple(name for name in expected if name not in filled)
    return Assignment(parts, followed, tuple(leftovers), missing, tuple(problems))


def unused(rules: Sequence[Rule], stored: Mapping[str, TensorHeader]) -> list[Rule]:
    """Rules that are about no stored tensor: of a map file, a mistake."""
    return [rule for rule in rules if all(rule.apply(name) is None for name in stored)]


def _first(name: str, rules: Sequence[Rule], expected: Shapes) -> tuple[Rule | None, tuple[str, ...]]:
    for rule in rules:
        targets = rule.apply(name)
        if targets is not None and all(target in expected for target in targets):
            return rule, targets
    return None, ()


def _cut(shape: tuple[int, ...], targets: list[tuple[str, tuple[int, ...]]]) -> tuple[Part, ...] | None:
    """Parts of a tensor of this shape, in order; None where they do not fit."""
    if len(targets) < 2:
        return tuple(Part(name) for name, wanted in targets) if all(shape == wanted for _, wanted in targets) else None
    if any(len(wanted) != len(shape) or wanted[1:] != shape[1:] for _, wanted in targets):
        return None
    parts, row = [], 0
    for name, wanted in targets:
        parts.append(Part(name, (row, row + wanted[0])))
        row += wanted[0]
    return tuple(parts) if row == shape[0] else None
