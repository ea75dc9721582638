"""Limits on images, and how vLLM passes them to its processes.

`casa-serve` reads the limits from its command line. They reach the code that loads images
in vLLM's official option `--media-io-kwargs`, as plain integers under the modality
"image", because that is what vLLM passes to a media connector in every server process.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields

from casa_engine.errors import InputError
from casa_engine.image_guard import ImageFileLimits
from casa_serving.options.command_line import add_options

# The one other option that the connector needs: image URLs may point to this machine (tests).
ALLOW_LOOPBACK = "allow_loopback_media"


@dataclass(frozen=True)
class ImageLimits(ImageFileLimits):
    """Limits on one image, and on all that are decoded at one time.

    Attributes:
        max_pixels_in_flight: Pixels of all images that are decoded at one time, over all
            requests and live sessions of one server process: 3 bytes of memory each.
    """

    max_pixels_in_flight: int = 512 * 1024 * 1024

    def __post_init__(self) -> None:
        """Check the values themselves.

        Raises:
            InputError: a limit that no image could meet.
        """
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be a whole number of at least 1, got {value!r}.")

    @classmethod
    def from_options(cls, options: dict[str, object]) -> ImageLimits:
        """Return the limits among `options` (a namespace's or a modality's), others default."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in options.items() if name in names})

    def option_note(self, name: str) -> str:
        """See `ImageFileLimits`."""
        return f" (--{name.replace('_', '-')})"

    def as_options(self) -> dict[str, int]:
        """Return the limits as plain integers by name."""
        return asdict(self)


HELP = {
    "max_image_bytes": "largest image file in bytes",
    "max_image_pixels": "most pixels (width x height) of an image",
    "max_image_side": "longest side of an image in pixels",
    "max_image_aspect": "largest ratio of an image's longer to its shorter side",
    "max_pixels_in_flight": "most pixels of images that are decoded at one time in one server process",
}


def add_limit_options(group: argparse._ArgumentGroup) -> None:
    """Add an option for every limit, each with its default in the help."""
    add_options(group, ImageLimits().as_options(), HELP)
