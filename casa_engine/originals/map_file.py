"""Map files: what a user says about a checkpoint that the tables do not know, in a few lines.

    family = "helium"
    blocks.{layer}.attn_x.* -> model.language_model.layers.{layer}.cross_attn.*
    adapter.scale -> -
    config.fusion = "ca_tv"
    config.ca_layers <- vision_layers

`->` names a tensor anew (see `rules.py`), `=` sets a field of our configuration, `<-` takes it from a field of the
original's. The same as JSON: {"family", "tensors": {there: here}, "set": {field: value}, "take": {field: there}}.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casa_engine.errors import CheckpointError
from casa_engine.originals.rules import GIVEN, Rule
from casa_engine.originals.tensor_tables import FAMILIES

MAX_FILE_BYTES, MAX_RULES = 1 << 20, 1000
SECTIONS = ("family", "tensors", "set", "take")


@dataclass(frozen=True)
class UserMap:
    """What map files say.

    Attributes:
        family: Name of a family; None where it is not said.
        rules: Of tensors, in the order in which they are tried.
        values: Values of our configuration's fields, by dotted name.
        sources: Fields of the original's config.json to take others from, by the name of ours.
        paths: The files.
    """

    family: str | None = None
    rules: tuple[Rule, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()


def read_maps(paths: Sequence[Path]) -> UserMap:
    """Read map files; what a later one says comes before what an earlier one does.

    Raises:
        CheckpointError: One is missing, too large, or has a line that is none of a map's.
    """
    result = UserMap(paths=tuple(paths))
    for path in paths:
        one = _read(Path(path))
        result = UserMap(
            one.family or result.family,
            one.rules + result.rules,
            result.values | one.values,
            result.sources | one.sources,
            result.paths,
        )
    if len(result.rules) > MAX_RULES:
        raise CheckpointError(
            f"{', '.join(map(str, paths))}: {len(result.rules)} tensors are named; expected at most {MAX_RULES}. Say "
            "{layer} in place of the layers' numbers."
        )
    return result


def _read(path: Path) -> UserMap:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"map file {path} cannot be read: {error}.") from error
    if len(content) > MAX_FILE_BYTES:
        raise CheckpointError(f"map file {path} is larger than {MAX_FILE_BYTES} bytes.")
    return _from_json(path, text) if text.lstrip().startswith("{") else _from_lines(path, text)


def _from_json(path: Path, text: str) -> UserMap:
    try:
        content = json.loads(text)
        if unknown := sorted(content.keys() - set(SECTIONS)):
            raise ValueError(f"it has {unknown[0]!r}; expected {', '.join(SECTIONS)}")
        rules = tuple(Rule(str(one), str(other), GIVEN, str(path)) for one, other in content.get("tensors", {}).items())
        return UserMap(
            _family(content["family"], str(path)) if "family" in content else None,
            rules,
            dict(content.get("set", {})),
            {name: str(value) for name, value in content.get("take", {}).items()},
        )
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"map file {path}: {error}.") from error


def _from_lines(path: Path, text: str) -> UserMap:
    family, rules, values, sources = None, [], {}, {}
    for number, line in enumerate(text.splitlines(), start=1):
        line, where = line.partition("#")[0].strip(), f"{path}, line {number}"
        if not line:
            continue
        for sign in (" -> ", " <- ", "="):
            left, found, right = (part.strip() for part in line.partition(sign))
            if found:
                break
        if not (left and found and right):
            raise CheckpointError(
                f"{where}: {line!r}; expected THERE -> HERE, config.FIELD = JSON or config.FIELD <- X."
            )
        if found == "->":
            rules.append(Rule(left, right, GIVEN, where))
        elif found == "<-":
            sources[_field(left, where)] = right
        elif left == "family":
            family = _family(right.strip('"'), where)
        else:
            values[_field(left, where)] = _value(right, where)
    return UserMap(family, tuple(rules), values, sources)


def _value(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f'{where}: {text!r} is not JSON; write texts in quotes, as in config.fusion = "ca".'
        ) from error


def _family(name: Any, where: str) -> str:
    if name not in FAMILIES:
        raise CheckpointError(f"{where}: family {name!r}; expected one of {', '.join(FAMILIES)}.")
    return name


def _field(name: str, where: str) -> str:
    if not name.startswith("config."):
        raise CheckpointError(f"{where}: {name!r}; expected a field of our configuration, such as config.fusion.")
    return name.removeprefix("config.")
