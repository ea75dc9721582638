"""Limits of an exported model: how long every dynamic axis may get, and the ranges that follow for each graph."""

import math
from dataclasses import asdict, dataclass

from casa_engine.configuration import CasaConfig
from casa_engine.errors import InputError
from casa_export.errors import ExportError

DEFAULT_MAX_TEXT_TOKENS = 4096
DEFAULT_MAX_CALL_TOKENS = 512
DEFAULT_MAX_BATCH = 4
IMAGES_IN_ONE_CALL = 4


@dataclass(frozen=True)
class Limits:
    """Largest sizes that an exported model takes.

    ONNX graphs are dynamic beyond these numbers; the runtimes hold to them so that ONNX Runtime and TensorRT (whose
    engines are built for exactly these ranges) accept the same requests.

    Attributes:
        batch: Conversations in one call.
        text_tokens: Text tokens of one conversation, generated ones included.
        call_tokens: New text tokens in one decoder call; longer prompts are fed in pieces.
        image_tokens: Image tokens of one image.
        call_image_tokens: Image tokens of all windows that one decoder call sees, and so of one window.
    """

    batch: int
    text_tokens: int
    call_tokens: int
    image_tokens: int
    call_image_tokens: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ExportError(f"limit {name} is {value!r}; expected a whole number from 1.")
        if self.call_image_tokens < self.image_tokens:
            raise ExportError(
                f"limit call_image_tokens is {self.call_image_tokens}, below image_tokens, {self.image_tokens}: one "
                "image would not fit into a call. Raise it or lower image_tokens."
            )

    def axes(self, config: CasaConfig) -> dict[str, dict[str, tuple[int, int]]]:
        """Return the smallest and largest size of every named axis of every graph."""
        vision = config.vision_config
        side = vision.window_size // vision.spatial_merge_size // vision.patch_size
        decoder = {
            "batch": (1, self.batch),
            "tokens": (1, self.call_tokens),
            "logits": (1, self.call_tokens),
            "image_tokens": (0, self.call_image_tokens),
            "past": (0, self.text_tokens),
        }
        if config.sees_window_text:
            decoder["window_past"] = (0, self.text_tokens)
        return {
            "vision": {
                "image_tokens": (1, self.image_tokens),
                "windows": (1, _most_windows(self.image_tokens, side)),
                "window_slots": (1, side**2),
            },
            "image_kv": {"batch": (1, self.batch), "image_tokens": (1, self.call_image_tokens)},
            "decoder": decoder,
        }

    def check_image(self, index: int, num_tokens: int) -> None:
        """Raise InputError if image `index` has too many image tokens."""
        if num_tokens > self.image_tokens:
            raise InputError(
                f"image {index} has {num_tokens} image tokens; these graphs take up to {self.image_tokens} for one "
                "image. Make it smaller, or export again with a larger --max-image-tokens."
            )

    def check_window(self, num_tokens: int) -> None:
        """Raise InputError if a decoder call would see so many image tokens."""
        if num_tokens > self.call_image_tokens:
            raise InputError(
                f"one window has {num_tokens} image tokens; these graphs take up to {self.call_image_tokens}. "
                "Put text between the images, make them smaller, or export with a larger --max-call-image-tokens."
            )

    def check_text(self, num_tokens: int) -> None:
        """Raise InputError if a conversation of so many text tokens is too long."""
        if num_tokens > self.text_tokens:
            raise InputError(
                f"the conversation has {num_tokens} text tokens; these graphs take up to {self.text_tokens}, "
                "generated ones included. Shorten it, or export again with a larger --max-text-tokens."
            )

    def check_batch(self, num_rows: int) -> None:
        """Raise InputError if a call has too many rows."""
        if num_rows > self.batch:
            raise InputError(
                f"the batch has {num_rows} rows; these graphs take up to {self.batch}. Split it, or export again "
                "with a larger --max-batch."
            )


def _most_windows(image_tokens: int, side: int) -> int:
    """Return the most windows of `side` x `side` image tokens over all shapes of an image of so many tokens."""
    # An image and the same on its side have as many windows, so the shorter side is enough.
    return max(-(-h // side) * -(-(image_tokens // h) // side) for h in range(1, math.isqrt(image_tokens) + 1))


def default_limits(config: CasaConfig, largest_image: int, **given: int | None) -> Limits:
    """Return the limits of a model where none are given.

    Args:
        config: Gives the longest text.
        largest_image: Image tokens of the largest image that the checkpoint's processor makes.
        **given: Fields of `Limits`; None leaves one to its default.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    image_tokens = chosen.get("image_tokens", largest_image)
    text_tokens = min(config.text_config.max_position_embeddings, DEFAULT_MAX_TEXT_TOKENS)
    defaults = {
        "batch": DEFAULT_MAX_BATCH,
        "text_tokens": text_tokens,
        "call_tokens": min(chosen.get("text_tokens", text_tokens), DEFAULT_MAX_CALL_TOKENS),
        "image_tokens": image_tokens,
        "call_image_tokens": IMAGES_IN_ONE_CALL * image_tokens,
    }
    return Limits(**(defaults | chosen))
