"""Rules that name tensors anew: patterns with `*` and `{layer}`.

`*` stands for any run of characters, `{layer}` for a number, any other `{word}` for one part between dots. The new
name repeats them; it may be several names with ` + ` between them (the rows are cut in that order) or `-` (left out).

Map files come with folders of strangers, so a pattern costs little whatever the name: one placeholder between two dots,
and of two `*` the first takes as little as it can and never tries again.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from casa_engine.errors import CheckpointError

HOLE = re.compile(r"(\*|\{[A-Za-z_][A-Za-z0-9_]*\})")
MAX_HOLES, MAX_STARS = 6, 2
LEFT_OUT, STAR = "-", "(.*)"
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
        for text in (self.source, self.target):
            if set("{}") & set(HOLE.sub("", text)):
                raise CheckpointError(
                    f"{self.origin}: {text!r} has braces that are no placeholder; expected {{layer}} or another "
                    "{word} of letters, digits and _, with a letter first."
                )
        if len(holes) > MAX_HOLES or any(holes.count(hole) > 1 for hole in holes if hole != "*"):
            raise CheckpointError(
                f"{self.origin}: {self.source!r} has {len(holes)} placeholders; expected at most {MAX_HOLES}, and each "
                "{word} once."
            )
        if holes.count("*") > MAX_STARS or any(len(HOLE.findall(part)) > 1 for part in self.source.split(".")):
            raise CheckpointError(
                f"{self.origin}: {self.source!r}; expected at most {MAX_STARS} times *, and no two placeholders "
                "without a dot between them."
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
        """Return our names for a tensor; None where the rule is not about it."""
        match = self._regex.fullmatch(name)
        return None if match is None else tuple(self._fill(target, match) for target in self.targets)

    @cached_property
    def _regex(self) -> re.Pattern:
        parts = [_group(part) if HOLE.fullmatch(part) else re.escape(part) for part in HOLE.split(self.source)]
        if parts.count(STAR) == MAX_STARS:
            first, second = (number for number, part in enumerate(parts) if part == STAR)
            middle = "".join(parts[first + 1 : second])
            parts[first:second] = [f"(?>(.*?){middle})"]
        return re.compile("".join(parts))

    def _fill(self, target: str, match: re.Match) -> str:
        stars = iter([match[number + 1] for number, hole in enumerate(HOLE.findall(self.source)) if hole == "*"])
        named = match.groupdict()
        return HOLE.sub(lambda hole: next(stars) if hole[0] == "*" else named[hole[0][1:-1]], target)


def _group(hole: str) -> str:
    if hole == "*":
        return STAR
    return rf"(?P<{hole[1:-1]}>{r'[0-9]+' if hole == '{layer}' else r'[^.]+'})"
