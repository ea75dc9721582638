"""Downloads from allowed domains, and from no address of the server's own network.

A client's URL makes the server connect somewhere (SSRF), so three things are checked at every hop, the
first and each redirect alike: the host is one of the allowed domains, the scheme is http(s), and every
address its name resolves to is public. The last check is in the resolver of the connection itself, so
that a name cannot resolve to a public address for the check and to a private one for the connection
(DNS rebinding). Proxies of the environment are not used, because a proxy resolves names itself.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from vllm.connections import HTTPConnection
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
from yarl import URL

MAX_REDIRECTS = 3
CHUNK_BYTES = 64 * 1024
MAX_SILENCE_S = 30.0
REDIRECTS = (301, 302, 303, 307, 308)
# IPv6 addresses that carry an IPv4 address to connect to in their last four bytes (RFC 6052).
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class UrlRefusedError(VLLMValidationError):
    """A URL that is rejected before any connection is made (HTTP 400).

    Attributes:
        reason: Why, without a word on what was to be downloaded.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"The image URL is refused: {reason}. {advice}", parameter="image_url")
        self.reason = reason


class DownloadError(VLLMUnprocessableEntityError):
    """An allowed URL that could not be downloaded (HTTP 422).

    Attributes:
        reason: Why, without a word on what was to be downloaded.
    """

    def __init__(self, url: URL, reason: str) -> None:
        super().__init__(
            f"The image could not be downloaded from {url.host!r}: {reason}. Check the URL, or send the image as a "
            "base64 data URL.",
            parameter="image_url",
        )
        self.reason = reason


def is_public(text: str, *, allow_loopback: bool = False) -> bool:
    """Return whether an address may be connected to for a client.

    Args:
        text: An IPv4 or IPv6 address.
        allow_loopback: Whether addresses of this machine itself are accepted (tests only).
    """
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address.teredo is not None:
            return False
        if inner is not None:
            return is_public(str(inner), allow_loopback=allow_loopback)
    if address.is_loopback:
        return allow_loopback
    return address.is_global and not address.is_multicast


class PublicResolver(AbstractResolver):
    """Resolves names as the system does and rejects addresses that are not public."""

    def __init__(self, *, allow_loopback: bool) -> None:
        self._system = aiohttp.ThreadedResolver()
        self._allow_loopback = allow_loopback

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses of `host`.

        Raises:
            UrlRefusedError: One of them is not public.
        """
        answers = await self._system.resolve(host, port, family)
        for answer in answers:
            check_address(host, answer["host"], allow_loopback=self._allow_loopback)
        return answers

    async def close(self) -> None:
        """Close the system's resolver."""
        await self._system.close()


def check_address(host: str, address: str, *, allow_loopback: bool) -> None:
    """Reject an address that is not public; the error message does not contain the address."""
    if not is_public(address, allow_loopback=allow_loopback):
        raise UrlRefusedError(
            f"the host {host!r} has a private, link-local, loopback or reserved address, and only public ones are "
            "connected to",
            "Send the image as a base64 data URL.",
        )


def check_host(url: URL, allowed_domains: list[str], *, allow_loopback: bool) -> None:
    """Reject a URL whose scheme or host is not allowed; resolve nothing yet."""
    if url.scheme not in ("http", "https") or not url.host:
        raise UrlRefusedError(
            f"got scheme {url.scheme!r} and host {url.host!r}, expected http or https and a host",
            "Or send the image as a base64 data URL.",
        )
    if url.host not in allowed_domains:
        allowed = ", ".join(allowed_domains) or "none"
        raise UrlRefusedError(
            f"the host {url.host!r} is not an allowed domain (--allowed-media-domains; allowed: {allowed})",
            "Send the image as a base64 data URL, or start the server with --allowed-media-domains.",
        )
    if not is_literal_address(url.host):
        return  # A name: the resolver checks its addresses when the connection is made.
    try:
        address = str(ipaddress.ip_address(url.host))
    except ValueError as error:
        raise UrlRefusedError(
            f"the host {url.host!r} is a shortened or damaged address", "Write it in full, or use its name."
        ) from error
    check_address(url.host, address, allow_loopback=allow_loopback)


def is_literal_address(host: str) -> bool:
    """Return whether aiohttp connects to `host` without calling the resolver.

    It treats every host of digits and dots as an address, and every one with a colon: also
    forms like "127.1" and "2130706433", which the system's own functions accept.
    """
    return ":" in host or host.replace(".", "").isdigit()


class GuardedConnection(HTTPConnection):
    """vLLM's connection for media, with the checks at every hop."""

    def __init__(self, allowed_domains: list[str], *, allow_loopback: bool) -> None:
        super().__init__()
        self._allowed_domains = allowed_domains
        self._allow_loopback = allow_loopback

    async def async_get_bytes(
        self,
        url: str,
        *,
        timeout: float | None = None,
        allow_redirects: bool = True,
        max_bytes: int | None = None,
    ) -> bytes:
        """Download `url`.

        Args:
            url: The address the client gave.
            timeout: Seconds for everything, all redirects included.
            allow_redirects: Whether up to three redirects are followed.
            max_bytes: Size limit, at which the download is aborted.

        Returns:
            The body of the response.

        Raises:
            VLLMValidationError: the URL or one it redirects to is rejected (HTTP 400).
            VLLMUnprocessableEntityError: it is allowed but cannot be downloaded (HTTP 422).
        """
        try:
            async with (
                asyncio.timeout(timeout),
                guarded_get(
                    URL(url),
                    self._allowed_domains,
                    allow_loopback=self._allow_loopback,
                    allow_redirects=allow_redirects,
                    headers=self._headers(),
                ) as response,
            ):
                return await read_body(response, URL(url), max_bytes)
        except TimeoutError as error:
            raise DownloadError(URL(url), f"no complete answer within {timeout:g} s") from error
        except aiohttp.ClientError as error:
            raise DownloadError(URL(url), "the connection or the answer broke") from error

    def get_bytes(
        self,
        url: str,
        *,
        timeout: float | None = None,
        allow_redirects: bool = True,
        max_bytes: int | None = None,
    ) -> bytes:
        """As `async_get_bytes`, for callers without an event loop."""
        return asyncio.run(
            self.async_get_bytes(url, timeout=timeout, allow_redirects=allow_redirects, max_bytes=max_bytes)
        )


@asynccontextmanager
async def guarded_get(
    url: URL,
    allowed_domains: list[str],
    *,
    allow_loopback: bool,
    allow_redirects: bool = True,
    headers: dict[str, str] | None = None,
    max_seconds: float = 300.0,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Request `url`, check every hop, and yield the response of status 200, whose body is not read yet.

    Raises:
        UrlRefusedError: the URL or one it redirects to is not allowed.
        DownloadError: too many redirects, or another status.
        aiohttp.ClientError: the connection broke.
    """
    first = url
    # One session per download: connections are never reused between clients.
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(resolver=PublicResolver(allow_loopback=allow_loopback), use_dns_cache=False),
        trust_env=False,
        # A compressed response could expand without bound while it is read.
        auto_decompress=False,
        headers={**(headers or {}), "Accept-Encoding": "identity"},
        timeout=aiohttp.ClientTimeout(total=max_seconds, sock_connect=MAX_SILENCE_S, sock_read=MAX_SILENCE_S),
    ) as session:
        for _ in range(MAX_REDIRECTS + 1):
            check_host(url, allowed_domains, allow_loopback=allow_loopback)
            async with session.get(url, allow_redirects=False) as response:
                if response.status not in REDIRECTS:
                    if response.status != 200:
                        raise DownloadError(first, f"HTTP status {response.status}")
                    yield response
                    return
                location = response.headers.get("Location")
            if not allow_redirects or not location:
                raise DownloadError(first, "it redirects, and redirects are not followed")
            url = url.join(URL(location))
        raise DownloadError(first, f"more than {MAX_REDIRECTS} redirects")


async def read_body(response: aiohttp.ClientResponse, url: URL, max_bytes: int | None) -> bytes:
    """Return a response's body, and read no more than `max_bytes` of it."""
    chunks: list[bytes] = []
    received = 0
    async for chunk in response.content.iter_chunked(CHUNK_BYTES):
        received += len(chunk)
        if max_bytes is not None and received > max_bytes:
            raise VLLMValidationError(
                f"The image at {url.host!r} is too large: more than {max_bytes} bytes "
                "(--max-image-bytes). Compress it or scale it down.",
                parameter="image_url",
            )
        chunks.append(chunk)
    return b"".join(chunks)
