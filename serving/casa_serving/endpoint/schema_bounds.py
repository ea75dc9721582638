"""Limits on grammars, schemas and regular expressions for structured outputs.

The engine compiles them one after the other, besides its steps, so that a slow one delays those of
every other client. What makes xgrammar slow was measured with the embedded model: two choices of
30,000 equal characters take minutes, of 4,000 a sixth of a second; 1,000 optional properties of
one object 5 s.
"""

from __future__ import annotations

from typing import Any

from casa_serving.endpoint.json_bounds import over_limit
from casa_serving.errors import RequestError
from casa_serving.options.request_limits import RequestLimits

FIELDS = ("structured_outputs", "response_format", "tools", "functions", "text", "output_config")
# Text that is not compiled.
PROSE = frozenset({"description", "title", "$comment", "examples"})
MAX_LITERAL_CHARS = 16_384
MAX_NAMES_OF_AN_OBJECT = 512
MAX_NAMES = 4096


def check_schemas(body: dict[str, Any], limits: RequestLimits) -> None:
    """Check every field of a request that may contain a schema.

    Raises:
        RequestError: 400: one is too large, or refers to itself alone.
    """
    for field in FIELDS:
        value = body.get(field)
        if isinstance(value, dict | list):
            SchemaCounter(field, limits).check(value)


class SchemaCounter:
    """Counts the contents of one field.

    Args:
        field: Its name.
        limits: The server's limits.
    """

    def __init__(self, field: str, limits: RequestLimits) -> None:
        self._field, self._limits = field, limits
        self._chars = self._literal_chars = self._names = 0

    def check(self, value: Any) -> None:
        """Check a value, whose depth is bounded already.

        Raises:
            RequestError: 400: see `check_schemas`.
        """
        self._count(value, is_prose=False)
        for what, got, most in (
            ("characters in choices, patterns and grammars", self._literal_chars, MAX_LITERAL_CHARS),
            ("names", self._names, MAX_NAMES),
        ):
            if got > most:
                raise self._too_many(what, got, most)
        if self._chars > self._limits.max_schema_chars:
            raise over_limit(
                f"has {self._chars} characters in {self._field!r}",
                self._limits.max_schema_chars,
                "max_schema_chars",
                self._field,
            )
        check_references(value, self._field)

    def _count(self, value: Any, *, is_prose: bool) -> None:
        if isinstance(value, dict):
            if len(value) > MAX_NAMES_OF_AN_OBJECT:
                raise self._too_many("names in one object", len(value), MAX_NAMES_OF_AN_OBJECT)
            self._names += len(value)
            for name, item in value.items():
                self._chars += len(name)
                # A property may have such a name; then its value is an object.
                self._count(item, is_prose=name in PROSE and not isinstance(item, dict))
        elif isinstance(value, list):
            for item in value:
                self._count(item, is_prose=is_prose)
        elif isinstance(value, str):
            self._chars += len(value)
            self._literal_chars += 0 if is_prose else len(value)

    def _too_many(self, what: str, got: int, most: int) -> RequestError:
        message = f"{self._field!r} has too many {what}: got {got}, at most {most} are taken. Send a smaller one."
        return RequestError(400, message, param=self._field)


def check_references(value: Any, field: str) -> None:
    """Reject schemas that consist of a cycle of references, which the engine cannot compile.

    Raises:
        RequestError: 400.
    """
    if isinstance(value, list):
        for item in value:
            check_references(item, field)
    elif isinstance(value, dict):
        if isinstance(value.get("$defs"), dict) or isinstance(value.get("definitions"), dict):
            for name in ("$defs", "definitions"):
                for target in (value.get(name) or {}).values():
                    follow(target, value, field)
        for item in value.values():
            check_references(item, field)


def follow(schema: Any, root: dict[str, Any], field: str) -> None:
    """Follow a schema from reference to reference."""
    seen = set()
    while isinstance(schema, dict) and isinstance(reference := schema.get("$ref"), str):
        if reference in seen:
            message = f"{field!r} has a schema that refers to itself and says nothing else: {reference[:60]!r}."
            raise RequestError(400, message, param=field)
        seen.add(reference)
        schema = resolve(reference, root)


def resolve(reference: str, root: dict[str, Any]) -> Any:
    """Return what a reference such as `#/$defs/name` points to, or None."""
    found: Any = root
    for step in reference.removeprefix("#").split("/")[1:]:
        found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return found
