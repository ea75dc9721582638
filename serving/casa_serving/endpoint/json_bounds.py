"""JSON that is measured before it is parsed, and strict parsing.

Python's parser has no limits: 10 MB of `[[],[],...` become 400 MB of lists. So the structure is
counted while the bytes come in, chunk by chunk, which also leaves the event loop free in between.
Regular expressions skip the runs between brackets and quotes; what is left for Python code is bounded
by the limits.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from casa_serving.errors import RequestError
from casa_serving.options.request_limits import RequestLimits

# Both match everywhere, possibly the empty string. Possessive, so that they never backtrack.
OUTSIDE = re.compile(rb'[^"\[\]{}]*+')
INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
OPENING, CLOSING, QUOTE = b"[{", b"]}", 0x22
# Names are strings too. Each costs a step of the Python loop; numbers are skipped together.
STRINGS_PER_CONTAINER = 4
# Numbers, blanks and punctuation; strings are not counted here.
MAX_BYTES_BETWEEN_STRINGS = 16 * 1024 * 1024
# One half of a UTF-16 surrogate pair.
SURROGATE = re.compile("[\ud800-\udfff]")
# Range of signed and unsigned integers of 64 bits together.
MIN_INTEGER, MAX_INTEGER = -(2**63), 2**64 - 1


class StructureCounter:
    """Counts the structure of a JSON text that comes in chunks.

    It does not check that the text is JSON: in other text it counts what looks like structure.

    Args:
        limits: The server's limits.
    """

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._depth = self._containers = self._values = self._strings = self._between = 0
        self._in_string = self._escaped = False

    def feed(self, piece: bytes) -> None:
        """Count the next chunk.

        Raises:
            RequestError: 400: a limit is exceeded.
        """
        at = 0
        if self._escaped and piece:
            self._escaped, at = False, 1
        while at < len(piece):
            at = self._skip_string(piece, at) if self._in_string else self._count(piece, at)

    def _skip_string(self, piece: bytes, at: int) -> int:
        at = INSIDE.match(piece, at).end()
        if at < len(piece):
            # The end of the string, or a backslash at the end of the chunk.
            self._escaped = piece[at] != QUOTE
            self._in_string = self._escaped
            at += 1
        return at

    def _count(self, piece: bytes, at: int) -> int:
        end = OUTSIDE.match(piece, at).end()
        self._between += end - at + 1
        self._values += piece.count(b",", at, end)
        if end < len(piece):
            self._count_mark(piece[end])
        self._check()
        return end + 1

    def _count_mark(self, mark: int) -> None:
        if mark == QUOTE:
            self._in_string = True
            self._strings += 1
        elif mark in OPENING:
            self._depth += 1
            self._containers += 1
        else:
            self._depth -= 1

    def _check(self) -> None:
        limits = self._limits
        if self._depth > limits.max_json_depth:
            raise over_limit("is nested too deeply", limits.max_json_depth, "max_json_depth")
        if self._containers > limits.max_json_containers:
            raise over_limit("has too many arrays and objects", limits.max_json_containers, "max_json_containers")
        if self._values > limits.max_json_values or self._strings > STRINGS_PER_CONTAINER * limits.max_json_containers:
            raise over_limit("has too many values", limits.max_json_values, "max_json_values")
        if self._between > MAX_BYTES_BETWEEN_STRINGS:
            raise RequestError(
                400, f"The body has more than {MAX_BYTES_BETWEEN_STRINGS} bytes outside of strings. Send less blanks."
            )


def over_limit(what: str, most: int, option: str, param: str | None = None) -> RequestError:
    """Return the error for a count over its limit."""
    message = f"The request {what}: at most {most} are taken (--{option.replace('_', '-')}). Send less in one request."
    return RequestError(400, message, param=param)


def parse_json(body: bytes) -> Any:
    """Parse a body whose structure has been counted.

    Stricter than Python's own parser: rejects numbers that JSON does not have (NaN, Infinity) or that no
    field can represent, duplicate names, lone surrogates, and encodings other than UTF-8.

    Raises:
        RequestError: 400: the body is invalid.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(400, f"The body is not UTF-8: byte {error.start} cannot be decoded.") from error
    try:
        return json.loads(text, object_pairs_hook=unique_names, parse_constant=reject_constant)
    except json.JSONDecodeError as error:
        message = f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        raise RequestError(400, message) from error
    except ValueError as error:  # Python's own limit on the digits of an integer.
        raise RequestError(400, "The body holds a number with too many digits.") from error
    except RecursionError as error:
        raise RequestError(400, "The body is nested too deeply.") from error


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; reject duplicate names, of which parsers take different values."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise RequestError(400, "The body is ambiguous: an object has the same name twice. Send each field once.")
    return found


def reject_constant(name: str) -> NoReturn:
    """Reject NaN, Infinity and -Infinity, which Python accepts and JSON does not have."""
    raise RequestError(400, f"The body is not JSON: {name} is no number there.")


def check_scalar(value: Any, path: str) -> None:
    """Reject strings and numbers that JSON can express and later layers cannot represent.

    Raises:
        RequestError: 400: a lone surrogate, or a number that is too large.
    """
    if isinstance(value, str):
        if not value.isascii() and SURROGATE.search(value):
            message = f"The text of {path!r} has half of a surrogate pair (\\ud800 to \\udfff), which is no character."
            raise RequestError(400, message, param=path)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise RequestError(400, f"The number of {path!r} is too large.", param=path)
    elif isinstance(value, int) and not MIN_INTEGER <= value <= MAX_INTEGER:
        raise RequestError(400, f"The number of {path!r} does not fit into 64 bits.", param=path)
