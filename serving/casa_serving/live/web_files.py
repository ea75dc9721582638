"""The web page of live captioning: static files at `/` and `/web/`, and its security headers.

The page needs nothing but its own server, and its headers forbid all other origins.
"""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from casa_engine.live.demonstration import Demonstration
from casa_engine.live.settings import INTEGER_RANGES, MAX_TEXT_CHARACTERS, NUMBER_RANGES
from casa_serving.live.protocol import MAX_QUESTION_CHARACTERS

INDEX = "index.html"
# Written by this process, from the settings' declaration: the bounds of the page's fields.
FIELDS = "fields.json"
# Also by this process: the model's name, and what its checkpoint says of itself.
MODEL = "model.json"
# By name, not by the machine's mime.types: a module of any other type is not run by browsers.
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
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
    "Permissions-Policy": "camera=(self), display-capture=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class WebFiles(StaticFiles):
    """The files of the page, served with `HEADERS`."""

    def __init__(self) -> None:
        super().__init__(packages=[("casa_serving", "web")])

    async def serve(self, request: Request) -> Response:
        """Return the file that the path names, or 304 to a browser that has it, or `FIELDS`, or `MODEL`.

        Raises:
            HTTPException: 404, there is no such file, or none of the page's kinds.
        """
        name = request.path_params.get("name", INDEX)
        if name == FIELDS:
            return JSONResponse(field_attributes(), headers=HEADERS)
        if name == MODEL:
            return JSONResponse(request.app.state.page_model, headers=HEADERS)
        if Path(name).suffix not in CONTENT_TYPES:
            raise HTTPException(404)
        return await self.get_response(name, request.scope)

    def file_response(self, full_path: str, *args: object, **kwargs: object) -> Response:
        """Add the headers to starlette's response."""
        response = super().file_response(full_path, *args, **kwargs)
        response.headers.update(HEADERS)
        if response.status_code != 304:
            response.headers["Content-Type"] = CONTENT_TYPES[Path(full_path).suffix]
        return response


def field_attributes() -> dict[str, dict[str, float | str]]:
    """Return the HTML attributes that bound the page's fields, by the fields' names."""
    texts = {"instruction": MAX_TEXT_CHARACTERS, "question": MAX_QUESTION_CHARACTERS}
    return {
        **{name: {"min": low, "max": high, "step": 1} for name, (low, high) in INTEGER_RANGES.items()},
        **{name: {"min": low, "max": high, "step": "any"} for name, (low, high) in NUMBER_RANGES.items()},
        **{name: {"maxlength": longest} for name, longest in texts.items()},
    }


def page_model(name: str, checkpoint: Path) -> dict[str, str | list[str]]:
    """Return what the page says about a model: `name`, `reads` and `questions`, see `Demonstration`.

    Raises:
        CheckpointError: the checkpoint's description of itself is invalid.
    """
    demonstration = Demonstration.for_checkpoint(checkpoint)
    return {"name": name, "reads": demonstration.reads, "questions": list(demonstration.questions)}


def attach(app: Starlette) -> None:
    """Add the page's routes after all others, so that none of them is shadowed.

    Mutates:
        app: its routes; whoever attaches them sets `app.state.page_model` before the first request.
    """
    web = WebFiles()
    for path in ("/", "/web/{name}"):
        app.router.routes.append(Route(path, web.serve, methods=["GET", "HEAD"], include_in_schema=False))
