"""The web page of live captioning: static files at `/` and `/web/`, and its security headers.

The files are read once, when the server starts, and looked up by name: no path from outside
ever reaches the file system. The page needs nothing but its own server, and its headers forbid
all other origins.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

INDEX = "index.html"
# By name, not by the machine's mime.types: a module of any other type is not run by browsers.
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        # The WebSocket /v1/live of this very server; `blob:` is the video that the user picked.
        "connect-src 'self'",
        "media-src blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    # Cached by browsers, but revalidated each time, so that a new release is seen at once.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class WebFile:
    """A file of the page.

    Attributes:
        body: Its bytes.
        content_type: The header Content-Type.
        etag: The header ETag, a digest of the bytes.
    """

    body: bytes
    content_type: str
    etag: str


def read_files() -> dict[str, WebFile]:
    """Returns every file of the page by its name."""
    found = {}
    for path in (files("casa_serving") / "web").iterdir():
        ending = path.name[path.name.rfind(".") :]
        if ending in CONTENT_TYPES:
            body = path.read_bytes()
            found[path.name] = WebFile(body, CONTENT_TYPES[ending], f'"{hashlib.sha256(body).hexdigest()[:16]}"')
    return found


def attach(app: Starlette) -> None:
    """Adds the page's routes after all others, so that none of them is shadowed.

    Mutates:
        app: its routes.
    """
    web = read_files()

    async def serve_file(request: Request) -> Response:
        """Returns a file, 304 to a browser that has it, or 404."""
        name = request.path_params.get("name", INDEX)
        if name not in web:
            return Response(f"There is no {name!r} here.\n", 404, HEADERS, "text/plain")
        return file_response(web[name], request.headers.get("if-none-match"))

    for path in ("/", "/web/{name}"):
        app.router.routes.append(Route(path, serve_file, methods=["GET", "HEAD"], include_in_schema=False))


def file_response(file: WebFile, known: str | None) -> Response:
    """Returns the response to a browser whose cached version of the file is `known`, or None."""
    headers = {**HEADERS, "ETag": file.etag}
    if known == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers={**headers, "Content-Type": file.content_type})
