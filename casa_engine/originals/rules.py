"""Rules that name tensors anew: patterns with `*` and `{layer}`.

`*` stands for any run of characters, `{layer}` for a number, any other `{word}` for one part between dots. The new
name repeats them; it may be several names with ` + ` between them (the rows are cut in that order) or `-` (left out).
"""

import re
from dataclasses import dataclass
from functools import cached_property

from casa_engine.errors import CheckpointError

HOLE = re.compile(r"(\*|\{\w+\})")
MAX_HOLES = 6
LEFT_OUT = "-"
# How sure a rule is.
KNOWN, UNVERIFIED, GIVEN, PROPOSED = "known", "unverified", "given", "proposed"


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        source: Pattern of names in the original.
        target: Our name, names, or `-`.
        status: `known`: from public scripts; `unverified`: a candidate; `given`: of a map file; `proposed`.
        origin: Where it stands, for messages.
    """

    source: str
    target: str
    status: str = UNVERIFIED
    origin: str = "the engine's table"

    def __post_init__(self) -> None:
        holes = HOLE.findall(self.source)
        if len(holes) > MAX_HOLES or any(holes.count(hole) > 1 for hole in holes if hole != "*"):
            raise CheckpointError(
                f"{self.origin}: {self.source!r} has {len(holes)} placeholders; expected at most {MAX_HOLES}, and each "
                "{word} once."
            )
        for name in self.targets:
            wanted = HOLE.findall(name)
            if any(wanted.count(hole) > holes.count(hole) for hole in wanted):
                raise CheckpointError(f"{self.origin}: {name!r} has placeholders that {self.source!r} has not.")

    @property
    def targets(self) -> tuple[str, ...]:
        """Our names; none where the tensor is left out."""
        return () if self.target == LEFT_OUT else tuple(name.strip() for name in self.target.split(" + "))

    def apply(self, name: str) -> tuple[str, ...] | None:
        """Returns our names for a tensor; None where the rule is not about it."""
        match = self._regex.fullmatch(name)
        return None if match is None else tuple(self._fill(target, match) for target in self.targets)

    @cached_property
    def _regex(self) -> re.Pattern:
        parts = HOLE.split(self.source)
        return re.compile("".join(_group(part) if HOLE.fullmatch(part) else re.escape(part) for part in parts))

    def _fill(self, target: str, match: re.Match) -> str:
        stars = iter([match[number + 1] for number, hole in enumerate(HOLE.findall(self.source)) if hole == "*"])
        named = match.groupdict()
        return HOLE.sub(lambda hole: next(stars) if hole[0] == "*" else named[hole[0][1:-1]], target)


def _group(hole: str) -> str:
    if hole == "*":
        return "(.*)"
    return rf"(?P<{hole[1:-1]}>{r'[0-9]+' if hole == '{layer}' else r'[^.]+'})"
