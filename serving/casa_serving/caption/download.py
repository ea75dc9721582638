"""Downloads a video to a temporary file under the rules for images: allowed domains, public addresses, every hop.

FFmpeg never gets a URL: its connections could not be checked.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

import aiohttp
from yarl import URL

from casa_engine.errors import InputError
from casa_serving.endpoint.fetch import CHUNK_BYTES, DownloadError, UrlRefusedError, guarded_get

MAX_DOWNLOAD_S = 3600.0


async def download(
    url: str, allowed_domains: list[str], folder: Path, *, max_bytes: int, allow_loopback: bool = False
) -> Path:
    """Download a video.

    Args:
        url: http(s) address.
        allowed_domains: Exact host names that are allowed.
        folder: A temporary folder for the file.
        max_bytes: Size limit, at which the download is aborted.
        allow_loopback: Whether the address may be this machine's (for tests).

    Returns:
        The file.

    Raises:
        InputError: The URL is rejected, or the download fails.
    """
    try:
        parsed = URL(url)
    except ValueError as error:
        raise InputError(f"{url!r} is not a URL. Expected http(s)://host/path.") from error
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="video-", delete=False) as file:
            async with guarded_get(
                parsed, allowed_domains, allow_loopback=allow_loopback, max_seconds=MAX_DOWNLOAD_S
            ) as response:
                await save(response, file, max_bytes)
            return Path(file.name)
    except UrlRefusedError as error:
        raise InputError(f"The video's URL is refused: {error.reason}.") from error
    except DownloadError as error:
        raise failed(url, error.reason) from error
    except TimeoutError as error:
        raise failed(url, "the server was silent for too long") from error
    except aiohttp.ClientError as error:
        raise failed(url, "the connection or the answer broke") from error


async def save(response: aiohttp.ClientResponse, file: IO[bytes], max_bytes: int) -> None:
    """Write a response's body to a file, and no more than `max_bytes` of it."""
    received = 0
    async for chunk in response.content.iter_chunked(CHUNK_BYTES):
        received += len(chunk)
        if received > max_bytes:
            raise InputError(f"The video is larger than {max_bytes} bytes (--max-download-bytes).")
        file.write(chunk)


def failed(url: str, reason: str) -> InputError:
    """Return the error for an allowed URL whose download failed."""
    return InputError(f"The video could not be downloaded from {url!r}: {reason}.")
