"""Picture files of `casa-export run`: what `casa-serve` takes by default, seen to be whole before any model loads."""

from pathlib import Path

from PIL import Image

from casa_engine.errors import InputError
from casa_engine.image_guard import IMAGE_TYPES, ImageFileLimits, ImageRefusedError, check_image, sniff
from casa_engine.image_preparation import DECODER_FAULTS, EncodedImage, read_image

LIMITS = ImageFileLimits()


class PictureFile(EncodedImage):
    """A picture on the user's disk.

    Args:
        path: A file of one of `IMAGE_TYPES`.

    Raises:
        InputError: It cannot be read, is no picture, damaged or too large.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self.data = file.read(LIMITS.max_image_bytes + 1)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}. Name a {IMAGE_TYPES} file.") from error
        self.decode()  # to see that it is whole; the pixels of many pictures are not kept until they are needed

    def decode(self) -> Image.Image:
        """Decode the file; see `EncodedImage`."""
        try:
            check_image(self.data, LIMITS)
            return read_image(self.data, sniff(self.data))
        except ImageRefusedError as error:
            raise InputError(f"{self._path}: {error}") from error
        except DECODER_FAULTS as error:
            raise InputError(
                f"{self._path} is damaged or cut off: it cannot be decoded. Name a whole {IMAGE_TYPES} file."
            ) from error
