"""The media connector that `casa-serve` registers in vLLM: every image passes through it.

vLLM loads the images of a request with the connector that `VLLM_MEDIA_CONNECTOR` names, in
threads, so that the event loop stays free. This one checks an image's header and returns the
file; it is decoded when the image processor needs its pixels, which is never if the same file was
processed before.
"""

from __future__ import annotations

import asyncio
import binascii
from http import HTTPStatus
from pathlib import Path
from typing import Any

from PIL import Image
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.multimodal.media import ImageMediaIO, MediaConnector, MediaIO, MediaWithBytes
from vllm.multimodal.media.connector import global_thread_pool
from yarl import URL

from casa_engine.errors import InputError
from casa_engine.image_guard import ImageRefusedError, check_image, check_size, sniff
from casa_engine.image_preparation import DECODER_FAULTS, EncodedImage, read_image
from casa_serving.endpoint.data_url import base64_text, compact, decoded, is_data_url
from casa_serving.endpoint.fetch import GuardedConnection, check_host
from casa_serving.endpoint.pixel_budget import PixelBudget
from casa_serving.options.image_limits import ALLOW_LOOPBACK, ImageLimits

# One per process, like the memory that it counts.
PIXELS = PixelBudget()


class GuardedImageIO(ImageMediaIO):
    """Decodes an image after its header has been checked."""

    def __init__(self, limits: ImageLimits) -> None:
        super().__init__(image_mode="RGB")
        self.limits = limits

    @classmethod
    def merge_kwargs(
        cls, default_kwargs: dict[str, Any] | None, runtime_kwargs: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Reject a request's own `media_io_kwargs`: they could raise the server's limits."""
        if runtime_kwargs:
            raise VLLMValidationError(
                "`media_io_kwargs` is not taken from requests by this server: how images are "
                "loaded is set when it starts. Leave the field out.",
                parameter="media_io_kwargs",
            )
        return dict(default_kwargs or {})

    def get_max_bytes(self) -> int:
        """Return the size limit of a download."""
        return self.limits.max_image_bytes

    def load_base64(self, media_type: str, data: str) -> Any:
        """Load an image from base64; the media type that the client declares is ignored."""
        try:
            packed = compact(data)
            check_size(len(packed) * 3 // 4, self.limits)
            file = decoded(packed)
        except binascii.Error as error:
            raise ImageRefusedError(
                "The image's data URL is not valid base64. Encode the file's bytes with the standard base64 alphabet."
            ) from error
        return self.load_bytes(file)

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        """Check the header and decode.

        Args:
            data: The encoded file.

        Returns:
            The image, upright, in RGB.
        """
        return MediaWithBytes(self.decode(data), data)

    def decode(self, data: bytes) -> Image.Image:
        """Return the image alone; acquire its pixels from the process's budget. Otherwise like `load_bytes`."""
        width, height = check_image(data, self.limits)
        num_pixels = width * height
        if not PIXELS.acquire(num_pixels, self.limits.max_pixels_in_flight):
            raise GracefulHTTPError(
                f"Too many pixels are being processed at once: {PIXELS.in_flight} and now "
                f"{num_pixels} more, at most {self.limits.max_pixels_in_flight} are taken "
                "(--max-pixels-in-flight). Send fewer or smaller images in one request, or try "
                "again in a moment.",
                HTTPStatus.TOO_MANY_REQUESTS,
            )
        with PIXELS.release_on_error(num_pixels):
            try:
                image = read_image(data, sniff(data))
            except DECODER_FAULTS as error:
                raise ImageRefusedError(
                    f"The image cannot be decoded: its header says {width} x {height} pixels, but "
                    "the data behind it is damaged or cut off. Send the whole file."
                ) from error
            PIXELS.release_with(image, num_pixels)
        return image

    def load_file(self, filepath: Path) -> Any:
        """Load a local file; vLLM has checked its folder."""
        try:
            check_size(filepath.stat().st_size, self.limits)
            return self.load_bytes(filepath.read_bytes())
        except OSError as error:
            raise ImageRefusedError("The local image file cannot be read. Check its path and permissions.") from error


class GuardedImage(EncodedImage):
    """A file whose header has been checked.

    Attributes:
        data: The file.
        size: Width and height in pixels, as stored.
    """

    def __init__(self, data: bytes, image_io: GuardedImageIO) -> None:
        self.data = data
        self.size = check_image(data, image_io.limits)
        self._image_io = image_io

    def decode(self) -> Image.Image:
        """See `EncodedImage`."""
        try:
            return self._image_io.decode(self.data)
        except InputError as error:
            raise invalid_image(error) from error


class GuardedFileIO(GuardedImageIO):
    """Checks an image's header and defers decoding."""

    def load_bytes(self, data: bytes) -> GuardedImage:
        """Return the checked file."""
        return GuardedImage(data, self)


class GuardedMediaConnector(MediaConnector):
    """Loads images from data URLs and, where the server allows it, from domains or files."""

    def __init__(
        self,
        media_io_kwargs: dict[str, dict[str, Any]] | None = None,
        *,
        allowed_local_media_path: str = "",
        allowed_media_domains: list[str] | None = None,
    ) -> None:
        options = dict((media_io_kwargs or {}).get("image", {}))
        self._allow_loopback = bool(options.pop(ALLOW_LOOPBACK, False))
        self._image_io = GuardedFileIO(ImageLimits.from_options(options))
        domains = allowed_media_domains or []
        super().__init__(
            media_io_kwargs,
            GuardedConnection(domains, allow_loopback=self._allow_loopback),
            allowed_local_media_path=allowed_local_media_path,
            allowed_media_domains=domains,
        )

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> GuardedImage:
        """Load an image; `image_mode` is vLLM's and ignored: CASA takes RGB only."""
        return self.load_from_url(image_url, self._image_io, fetch_timeout=fetch_timeout_s())

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> GuardedImage:
        """As `fetch_image`, without blocking the event loop."""
        return await self.load_from_url_async(image_url, self._image_io, fetch_timeout=fetch_timeout_s())

    def load_from_url(self, url: str, media_io: MediaIO, *, fetch_timeout: int | None = None) -> Any:
        """Load one image from a URL after checking it."""
        try:
            if self._is_data(url, media_io):
                return load_data_url(url, media_io)
            return super().load_from_url(url, media_io, fetch_timeout=fetch_timeout)
        except InputError as error:
            raise invalid_image(error) from error

    async def load_from_url_async(self, url: str, media_io: MediaIO, *, fetch_timeout: int | None = None) -> Any:
        """As `load_from_url`, without blocking the event loop."""
        try:
            if self._is_data(url, media_io):
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(global_thread_pool, load_data_url, url, media_io)
            return await super().load_from_url_async(url, media_io, fetch_timeout=fetch_timeout)
        except InputError as error:
            raise invalid_image(error) from error

    def fetch_image_embedding(self, data: str) -> Any:
        """Reject embeddings: a tensor in a request is no image that was checked. The same for the five below."""
        raise unsupported_media()

    async def fetch_image_embedding_async(self, data: str) -> Any:
        """Reject embeddings."""
        raise unsupported_media()

    fetch_audio_embedding = fetch_video_embedding = fetch_image_embedding
    fetch_audio_embedding_async = fetch_video_embedding_async = fetch_image_embedding_async

    def _is_data(self, url: object, media_io: MediaIO) -> bool:
        """Return whether a URL is a data URL; reject all others but those that may be fetched."""
        if not isinstance(media_io, GuardedImageIO):
            raise unsupported_media()
        if not isinstance(url, str):
            raise VLLMValidationError(
                f"The image URL is refused: got {type(url).__name__}, expected text.", parameter="image_url"
            )
        if is_data_url(url):
            return True
        scheme = url.partition(":")[0].lower()
        if scheme == "file" and self.allowed_local_media_path is not None:
            return False  # vLLM itself keeps the path inside the allowed folder.
        if scheme not in ("http", "https"):
            raise VLLMValidationError(
                f"The image URL is refused: got the scheme {scheme[:16]!r}, expected a base64 data "
                "URL, or http(s) from an allowed domain. Local files are read only from "
                "--allowed-local-media-path.",
                parameter="image_url",
            )
        check_host(parse(url), self.allowed_media_domains, allow_loopback=self._allow_loopback)
        return False


def load_data_url(url: str, media_io: GuardedImageIO) -> Any:
    """Load an image from a data URL."""
    text = base64_text(url)
    if text is None:
        raise VLLMValidationError(
            "The image's data URL is not of the form data:image/png;base64,... : only base64 data is taken.",
            parameter="image_url",
        )
    return media_io.load_base64("", text)


def unsupported_media() -> VLLMValidationError:
    """Return the HTTP 400 for media other than images."""
    return VLLMValidationError("Only images and text are taken, no audio, no video and no embeddings.")


def parse(url: str) -> URL:
    """Parse an http(s) URL of a client."""
    try:
        return URL(url)
    except ValueError as error:
        raise VLLMValidationError(
            "The image URL cannot be parsed. Expected http(s)://host/path.", parameter="image_url"
        ) from error


def invalid_image(error: InputError) -> VLLMValidationError:
    """Return the HTTP 400 for an invalid image."""
    return VLLMValidationError(str(error), parameter="image_url")


def fetch_timeout_s() -> int:
    """Return vLLM's own time limit for the download of an image."""
    from vllm import envs

    return envs.VLLM_IMAGE_FETCH_TIMEOUT
