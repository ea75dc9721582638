"""What a live session is asked to do. The defaults are those of the published captioner."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from casa_engine.errors import CheckpointError, InputError

SETTINGS_FILE = "live_settings.json"
MAX_TEXT_CHARACTERS = 20_000


@dataclass(frozen=True)
class LiveSettings:
    """Settings of one session; checked when they are made.

    Attributes:
        instruction: The user's words.
        system: The system prompt, if any.
        prompt: Priming text: the first caption begins with it.
        fps: Frames a second that the client means to send.
        max_frame_tokens: Most tokens generated for a frame, the stop token included.
        max_answer_tokens: The same for the answer to a question.
        temperature: 0 is greedy.
        top_k: Number of tokens to sample from; 0 is all.
        seed: Makes sampling repeatable.
        repetition_penalty: Divides the logits of what was said lately; 1 is off.
        penalty_decay: How much of what was said still counts a token later.
        penalty_clamp: Most occurrences that count.
        stop_bias: Below 1 the model goes on more readily, above it stops more readily; 1 is off.
        ngram_size: No sequence of so many tokens is said twice within the window; 0 is off.
        ngram_window: Length of that window in tokens.
        text_budget: Most text tokens kept; the oldest captions leave when it is reached.
    """

    instruction: str = "Please describe what you see in the video in real-time. Stick to the visual facts. "
    system: str | None = None
    prompt: str = ""
    fps: float = 2.0
    max_frame_tokens: int = 20
    max_answer_tokens: int = 128
    temperature: float = 0.4
    top_k: int = 256
    seed: int | None = None
    repetition_penalty: float = 1.15
    penalty_decay: float = 0.99
    penalty_clamp: float = 5.0
    stop_bias: float = 0.95
    ngram_size: int = 4
    ngram_window: int = 60
    text_budget: int = 2048

    def __post_init__(self) -> None:
        """Raise InputError for a field of another type or out of range."""
        for name in ("instruction", "prompt"):
            self._check_text(name, getattr(self, name))
        if self.system is not None:
            self._check_text("system", self.system)
        for name, (low, high) in INTEGER_RANGES.items():
            self._check_integer(name, low, high)
        if self.seed is not None:
            self._check_integer("seed", 0, 2**63 - 1)
        for name, (low, high) in NUMBER_RANGES.items():
            self._check_number(name, low, high)

    @classmethod
    def for_checkpoint(cls, folder: Path, **overrides: Any) -> "LiveSettings":
        """The settings that fit a checkpoint: its own file where it carries one, and what the caller wants.

        Args:
            folder: The checkpoint; its `live_settings.json` holds any of the fields.
            **overrides: Fields that win over everything.

        Raises:
            CheckpointError: The file is not what it should be.
            InputError: An unknown field, or an invalid value.
        """
        path = Path(folder) / SETTINGS_FILE
        own: dict[str, Any] = {}
        if path.is_file():
            try:
                own = json.loads(path.read_text())
                cls.from_fields(own)
            except (ValueError, TypeError) as error:
                raise CheckpointError(
                    f"{SETTINGS_FILE} of the checkpoint is no set of live settings: {error}"
                ) from error
        return cls.from_fields({**own, **overrides})

    @classmethod
    def from_fields(cls, values: dict[str, Any]) -> "LiveSettings":
        """Settings from a dictionary; unknown names are refused with InputError."""
        if not isinstance(values, dict):
            raise InputError(f"live settings are a {type(values).__name__}; expected an object of named fields.")
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(name) for name in set(values) - set(known))
        if unknown:
            raise InputError(f"unknown live settings {shown(unknown)}; expected any of {known}.")
        return cls(**values)

    def _check_text(self, name: str, text: Any) -> None:
        if not isinstance(text, str) or len(text) > MAX_TEXT_CHARACTERS:
            got = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
            raise InputError(f"{name} is {got}; expected a text of up to {MAX_TEXT_CHARACTERS} characters.")

    def _check_integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InputError(f"{name} is {shown(value)}; expected an integer from {low} to {high}.")

    def _check_number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # NaN and infinity are in no range; an integer may be too large for a float.
        if not is_number or not low <= value <= high:
            raise InputError(f"{name} is {shown(value)}; expected a number from {low:g} to {high:g}.")


def shown(value: Any) -> str:
    """Return a refused value in at most a line, whatever a client has sent."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (int, float, type(None))):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "...")
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        rest = [] if len(value) <= 5 else [f"{len(value) - 5} more"]
        return "[" + ", ".join([*map(shown, value[:5]), *rest]) + "]"
    return f"a {type(value).__name__}"


INTEGER_RANGES = {
    "max_frame_tokens": (1, 1024),
    "max_answer_tokens": (1, 8192),
    "top_k": (0, 1_000_000),
    "ngram_size": (0, 64),
    "ngram_window": (1, 4096),
    "text_budget": (32, 10_000_000),
}
NUMBER_RANGES = {
    "fps": (0.001, 240.0),
    "temperature": (0.0, 10.0),
    "repetition_penalty": (0.01, 100.0),
    "penalty_decay": (0.0, 1.0),
    "penalty_clamp": (0.0, 1000.0),
    "stop_bias": (0.01, 100.0),
}
