"""Limits on a request, on every path: bytes, time, counts, text.

`casa-serve` reads the limits from its command line, a cluster from its configuration. They are
checked by the request guard before anything is built from a body.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from casa_engine.errors import InputError
from casa_serving.options.command_line import add_options
from casa_serving.options.live_options import MAX_SECONDS

DEFAULT_MAX_REQUEST_BYTES = 100_000_000


@dataclass(frozen=True)
class RequestLimits:
    """Limits on one request, and on all of a server process together.

    Attributes:
        max_request_bytes: Size of the body.
        max_request_bytes_in_flight: Size of all bodies that are being read or whose requests are
            being answered; the parsed JSON of each takes about as much again.
        request_read_timeout: Seconds from the first byte of a body to its last.
        max_json_depth: Arrays and objects inside one another.
        max_json_values: Values in a body, counted where they are separated.
        max_json_containers: Arrays and objects in a body: what the API's models are built from.
        max_list_items: Items of an array: messages, parts, prompts, tools. Token ids are only
            counted as values.
        max_text_chars: Characters of all texts that are not images.
        max_n: Answers of one request: `n`, times its prompts.
        max_schema_chars: Characters of a grammar, JSON schema, regular expression or list of
            choices, and of all tools together.
        max_logprobs_values: Log probabilities in one answer that is not streamed: tokens times
            `top_logprobs` + 1. They are serialised at once, which blocks the event loop.
    """

    max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES
    max_request_bytes_in_flight: int = 400_000_000
    request_read_timeout: float = 60.0
    max_json_depth: int = 64
    max_json_values: int = 262_144
    max_json_containers: int = 16_384
    max_list_items: int = 2048
    max_text_chars: int = 2_097_152
    max_n: int = 128
    max_schema_chars: int = 65_536
    max_logprobs_values: int = 40_000

    def __post_init__(self) -> None:
        """Check the values themselves.

        Raises:
            InputError: a limit that no request could meet.
        """
        for name, value in asdict(self).items():
            option = f"--{name.replace('_', '-')}"
            if name == "request_read_timeout":
                if not 0 < value <= MAX_SECONDS:
                    expected = f"seconds, more than 0 and at most {MAX_SECONDS:.0f}"
                    raise InputError(f"{option} must be {expected}, got {value!r}.")
            elif not isinstance(value, int) or value < 1:
                raise InputError(f"{option} must be a whole number of at least 1, got {value!r}.")
        if self.max_request_bytes > self.max_request_bytes_in_flight:
            raise InputError(
                f"--max-request-bytes {self.max_request_bytes} is more than --max-request-bytes-in-flight "
                f"{self.max_request_bytes_in_flight}: no such request could be taken. Raise the latter."
            )

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> RequestLimits:
        """Return the limits among `options`, others default."""
        return cls(**{field.name: options[field.name] for field in fields(cls) if field.name in options})


HELP = {
    "max_request_bytes": "largest body of a request in bytes",
    "max_request_bytes_in_flight": "most bytes of the bodies of all requests in one server process",
    "request_read_timeout": "seconds in which a body must have come",
    "max_json_depth": "deepest nesting of a body",
    "max_json_values": "most values in a body",
    "max_json_containers": "most arrays and objects in a body",
    "max_list_items": "most items of an array in a body, other than token ids",
    "max_text_chars": "most characters of text in a body, images not counted",
    "max_n": "most answers of one request: n times its prompts",
    "max_schema_chars": "longest grammar, schema, regular expression or list of tools in characters",
    "max_logprobs_values": "most log probabilities in an answer that is not streamed",
}


def add_request_options(group: argparse._ArgumentGroup) -> None:
    """Add an option for every limit, each with its default in the help."""
    add_options(group, asdict(RequestLimits()), HELP)
