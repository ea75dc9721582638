"""The messages of `/v1/live`, each a pydantic model; docs/live.md documents them.

A client sends JSON text messages (`Create`, `Question`, `Stop`) and frames, which are binary: 8
bytes with the timestamp in seconds (little-endian float64), then a JPEG, PNG or WebP file. The
server sends JSON text messages only. Unknown fields of a client are rejected, because a misspelt
option that is silently ignored is a bug that nobody finds; unknown fields of a server are ignored, so
that a client works with the server's next version.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from casa_engine.errors import CasaError, InputError
from casa_engine.image_guard import IMAGE_TYPES
from casa_engine.live import LiveSettings
from casa_engine.live.settings import MAX_TEXT_CHARACTERS
from casa_serving.live.results import FrameResult
from casa_serving.options.image_limits import ImageLimits
from casa_serving.options.live_options import MAX_TEXT_BYTES

PATH = "/v1/live"
SUBPROTOCOL = "casa-live"
TIMESTAMP = struct.Struct("<d")
MAX_QUESTION_CHARACTERS = 2000
MAX_HISTORY_ITEMS = 4096

ErrorCode = Literal[
    "no_session",
    "already_created",
    "bad_message",
    "bad_settings",
    "bad_frame",
    "frame_too_large",
    "too_many_sessions",
    "idle_timeout",
    "slow_client",
    "engine_error",
]
# Close codes; 1009 (a message above 16 MiB) is sent by the WebSocket layer itself.
STOPPED, POLICY, ENGINE_ERROR, SHUTTING_DOWN, IDLE, SLOW_CLIENT = 1000, 1008, 1011, 1012, 4000, 4001


class LiveError(CasaError):
    """A client's mistake, reported by an `error` event.

    Args:
        code: One of the protocol's error codes.
        message: What, got, expected, how to fix.
        id: The client's own id of the rejected question, if it has one.
    """

    def __init__(self, code: ErrorCode, message: str, *, id: str | None = None) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.id = id


class ClientMessage(BaseModel):
    """A JSON message of a client: exactly these fields, of exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class CaptionItem(ClientMessage):
    """One caption of an earlier session."""

    caption: str = Field(max_length=MAX_TEXT_CHARACTERS)
    timestamp: float | None = None


class AnswerItem(ClientMessage):
    """One question of an earlier session and its answer."""

    question: str = Field(max_length=MAX_QUESTION_CHARACTERS)
    answer: str = Field(max_length=MAX_TEXT_CHARACTERS)


class CreateBase(ClientMessage):
    """`session.create` without the settings' own fields."""

    type: Literal["session.create"] = "session.create"
    history: list[CaptionItem | AnswerItem] = Field(default=[], max_length=MAX_HISTORY_ITEMS)

    def settings(self, defaults: LiveSettings) -> LiveSettings:
        """Return the server's defaults, overridden by the client's settings.

        Raises:
            LiveError: A value is invalid (`bad_settings`).
        """
        named = {name: getattr(self, name) for name in self.model_fields_set if name in SETTINGS}
        try:
            return replace(defaults, **named)
        except InputError as error:
            raise LiveError("bad_settings", str(error)) from error


SETTINGS = tuple(field.name for field in fields(LiveSettings))
_HINTS = get_type_hints(LiveSettings)
# The settings' fields are declared once, in LiveSettings; an unset one takes the server's default.
Create = create_model("Create", __base__=CreateBase, **{name: (_HINTS[name], None) for name in SETTINGS})


class Question(ClientMessage):
    """A question about the video or earlier captions, answered between two frames."""

    type: Literal["question"] = "question"
    text: str = Field(min_length=1, max_length=MAX_QUESTION_CHARACTERS)
    id: str | None = Field(default=None, max_length=200)


class Stop(ClientMessage):
    """Ends the session after the items in progress or queued."""

    type: Literal["session.stop"] = "session.stop"


CLIENT_MESSAGES: dict[str, type[ClientMessage]] = {"session.create": Create, "question": Question, "session.stop": Stop}


@dataclass(frozen=True)
class Frame:
    """A binary message.

    Attributes:
        number: 0 for the session's first binary message; rejected ones are counted too.
        timestamp: Its time in the video, in seconds.
        data: The encoded image.
        arrived_s: Time of arrival on the server's monotonic clock, in seconds.
    """

    number: int
    timestamp: float
    data: bytes
    arrived_s: float


def read_text(text: str) -> ClientMessage:
    """Parse a text message.

    Raises:
        LiveError: It is no valid message (`bad_message`, or `bad_settings` in a create).
    """
    if len(text) > MAX_TEXT_BYTES:
        raise LiveError(
            "bad_message", f"The message is too long: got {len(text)} characters, at most {MAX_TEXT_BYTES}."
        )
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LiveError("bad_message", "A text message must be JSON; send frames as binary messages.") from error
    kind = message.get("type") if isinstance(message, dict) else None
    model = CLIENT_MESSAGES.get(kind) if isinstance(kind, str) else None
    if model is None:
        known = ", ".join(CLIENT_MESSAGES)
        raise LiveError("bad_message", f"The message has the type {str(kind)[:40]!r}, expected one of: {known}.")
    try:
        return model.model_validate(message)
    except ValidationError as error:
        code: ErrorCode = "bad_settings" if model is Create else "bad_message"
        raise LiveError(code, f"{kind}: {describe(error)}", id=given_id(message)) from error


def given_id(message: dict[str, Any]) -> str | None:
    """Return the `id` of an otherwise invalid question; None if it has no valid one."""
    if message["type"] != "question":
        return None
    try:
        return Question(text="-", id=message.get("id")).id
    except ValidationError:
        return None


def describe(error: ValidationError) -> str:
    """Return the error message, one sentence for each invalid field, without pydantic's links."""
    found = []
    for fault in error.errors(include_url=False)[:4]:
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            found.append(f"the field {name[:60]!r} is unknown")
        elif fault["type"] == "missing":
            found.append(f"the field {name[:60]!r} is missing")
        else:
            found.append(f"{name}: {fault['msg']}, got {str(fault['input'])[:60]!r}")
    return "; ".join(found) + "."


def read_frame(message: bytes, number: int, arrived_s: float, max_bytes: int) -> Frame:
    """Parse a binary message; the image itself is decoded when it is processed.

    Raises:
        LiveError: Too short, too large, or an invalid timestamp (`bad_frame`, `frame_too_large`).
    """
    if len(message) <= TIMESTAMP.size:
        raise LiveError(
            "bad_frame",
            f"The frame is too short: got {len(message)} bytes, expected 8 bytes with the timestamp in seconds "
            f"(little-endian float64) and then a {IMAGE_TYPES} file.",
        )
    if len(message) - TIMESTAMP.size > max_bytes:
        raise LiveError(
            "frame_too_large",
            f"The frame is too large: got {len(message) - TIMESTAMP.size} bytes, at most {max_bytes} are taken "
            "(--live-max-frame-bytes). Scale it down or compress it.",
        )
    (timestamp,) = TIMESTAMP.unpack_from(message)
    if not math.isfinite(timestamp):
        raise LiveError("bad_frame", f"The frame's timestamp is {timestamp}, expected seconds (little-endian float64).")
    return Frame(number, timestamp, message[TIMESTAMP.size :], arrived_s)


class Event(BaseModel):
    """A message of the server."""

    model_config = ConfigDict(extra="ignore")


class Limits(Event):
    """The server's limits; see docs/limits.md. An older server does not send those on a frame's size."""

    max_frame_bytes: int
    max_frame_pixels: int = ImageLimits.max_image_pixels
    max_frame_side: int = ImageLimits.max_image_side
    idle_timeout_s: float
    max_sessions: int


class Created(Event):
    """The session is ready for frames."""

    type: Literal["session.created"] = "session.created"
    session: str
    settings: dict[str, Any]
    limits: Limits


class CaptionDelta(Event):
    """A piece of a caption."""

    type: Literal["caption.delta"] = "caption.delta"
    frame: int
    timestamp: float
    text: str


class FrameDoneBase(Event):
    """A frame's caption is complete: its number and the fields of its `FrameResult`."""

    type: Literal["frame.done"] = "frame.done"
    frame: int

    @classmethod
    def of(cls, frame: int, result: FrameResult) -> FrameDone:
        """Return the event of a frame's number and result; times are rounded."""
        values = {name: round(value, 2) if name.endswith("_ms") else value for name, value in asdict(result).items()}
        return FrameDone(frame=frame, **values)

    @property
    def result(self) -> FrameResult:
        """The frame's result, as the server's session gave it."""
        return FrameResult(**self.model_dump(exclude={"type", "frame"}))


# The result's fields are declared once, in FrameResult.
FrameDone = create_model(
    "FrameDone", __base__=FrameDoneBase, **{name: (hint, ...) for name, hint in get_type_hints(FrameResult).items()}
)


class FrameDropped(Event):
    """A newer frame replaced this one in the queue."""

    type: Literal["frame.dropped"] = "frame.dropped"
    frame: int
    timestamp: float
    replaced_by: int


class AnswerDelta(Event):
    """A piece of an answer; `question` counts the session's questions from 0."""

    type: Literal["answer.delta"] = "answer.delta"
    question: int
    id: str | None
    text: str


class AnswerDone(Event):
    """An answer is complete."""

    type: Literal["answer.done"] = "answer.done"
    question: int
    id: str | None
    text: str
    num_tokens: int
    total_ms: float


class ErrorEvent(Event):
    """An error; the session goes on unless it is `fatal`. `id` is that of a rejected question."""

    type: Literal["error"] = "error"
    code: ErrorCode
    message: str
    frame: int | None = None
    question: int | None = None
    id: str | None = None
    fatal: bool = False


class Delays(Event):
    """Percentiles of the delays of a session's last frames, in milliseconds; None before the first."""

    p50: float | None
    p95: float | None
    max: float | None


class Statistics(Event):
    """Statistics of a session; `late` frames took longer than 1/fps."""

    frames: int
    captioned: int
    silent: int
    dropped: int
    refused: int
    tokens: int
    questions: int
    duration_s: float
    late: int
    delay_ms: Delays
    trims: int
    restarts: int


class Closed(Event):
    """The last message of a session."""

    type: Literal["session.closed"] = "session.closed"
    reason: str
    statistics: Statistics


ServerEvent = Created | CaptionDelta | FrameDone | FrameDropped | AnswerDelta | AnswerDone | ErrorEvent | Closed
_EVENTS: TypeAdapter[ServerEvent] = TypeAdapter(Annotated[ServerEvent, Field(discriminator="type")])


def read_event(text: str | bytes) -> ServerEvent | None:
    """Parse a server's message (for clients); return None for a type that this version does not know."""
    try:
        return _EVENTS.validate_json(text)
    except ValidationError as error:
        if error.errors()[0]["type"] == "union_tag_invalid":
            return None
        raise
