"""The operator's options for live sessions."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from typing import Any

from casa_engine.errors import InputError
from casa_serving.options.command_line import add_options

# uvicorn closes a WebSocket with 1009 at a message above 16 MiB; 8 bytes of it are the timestamp.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
TIMESTAMP_BYTES = 8
MAX_FRAME_BYTES = MAX_MESSAGE_BYTES - TIMESTAMP_BYTES
MAX_TEXT_BYTES = 1024 * 1024
# A week: long enough, and event loops reject timers of more than some months.
MAX_SECONDS = 604_800.0
LOWEST = {"live_max_sessions": 0, "live_max_frame_bytes": 1, "live_text_budget": 1}


@dataclass(frozen=True)
class LiveOptions:
    """Limits on live sessions, for each server process.

    Attributes:
        live_max_sessions: Open connections; 0 turns live sessions off altogether.
        live_idle_timeout: Seconds without a message from the client, after which the session is closed.
        live_create_timeout: Seconds from the connection to `session.create`.
        live_send_timeout: Seconds for a client to read a message, after which it is disconnected.
        live_max_frame_bytes: Largest encoded frame.
        live_text_budget: Largest text budget that a client may ask for; None is the checkpoint's own.
    """

    live_max_sessions: int = 8
    live_idle_timeout: float = 60.0
    live_create_timeout: float = 10.0
    live_send_timeout: float = 10.0
    live_max_frame_bytes: int = MAX_FRAME_BYTES
    live_text_budget: int | None = None

    def __post_init__(self) -> None:
        """Check the values themselves.

        Raises:
            InputError: an option that no session could meet.
        """
        for name, value in asdict(self).items():
            if value is None:
                continue
            option = f"--{name.replace('_', '-')}"
            if name not in LOWEST and not 0 < value <= MAX_SECONDS:
                raise InputError(f"{option} must be seconds, more than 0 and at most {MAX_SECONDS:.0f}, got {value!r}.")
            if name in LOWEST and value < LOWEST[name]:
                off = " (0 turns live sessions off)" if LOWEST[name] == 0 else ""
                raise InputError(f"{option} must be a whole number of at least {LOWEST[name]}{off}, got {value!r}.")

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> LiveOptions:
        """Return the options among a command line's; a frame is never larger than any other image."""
        known = {field.name: arguments[field.name] for field in fields(cls) if field.name in arguments}
        image_bytes = arguments.get("max_image_bytes", MAX_FRAME_BYTES)
        known["live_max_frame_bytes"] = min(known["live_max_frame_bytes"], image_bytes, MAX_FRAME_BYTES)
        return cls(**known)

    @property
    def max_message_bytes(self) -> int:
        """Size of the largest WebSocket message.

        Twice a frame, so that one that is somewhat too large gets an error event and does not end its session.
        """
        return min(max(2 * self.live_max_frame_bytes + TIMESTAMP_BYTES, MAX_TEXT_BYTES), MAX_MESSAGE_BYTES)


HELP = {
    "live_max_sessions": "most live sessions at once, for each API server process; 0 turns /v1/live and the page off",
    "live_idle_timeout": "seconds that a live client may send nothing",
    "live_create_timeout": "seconds that a live client has to create its session",
    "live_send_timeout": "seconds that a live client may not read what it is sent",
    "live_max_frame_bytes": "largest frame in bytes, at most --max-image-bytes and 16 MiB",
    "live_text_budget": "largest text budget in tokens that a live client may ask for (None: the checkpoint's own)",
}


def add_live_options(group: argparse._ArgumentGroup) -> None:
    """Add an option for each, with its default in the help."""
    add_options(group, asdict(LiveOptions()), HELP)
