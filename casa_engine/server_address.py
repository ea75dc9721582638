"""What is the address of a server, for every command that asks one."""

from urllib.parse import urlsplit


def is_server_address(url: str) -> bool:
    """Return whether `url` has http or https, a host, and a port that can be connected to where it has one."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
