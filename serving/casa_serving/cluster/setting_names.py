"""Names of settings in error messages: `casa-serve`'s are options, a cluster's are keys of a file.

The code that checks a limit is the same in both and names the option. In a cluster the names are
translated in the ingress's responses, wherever the check was made.
"""

from __future__ import annotations

import json
import re

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from casa_serving.cluster.config import LIVE_OPTIONS, Images, Ingress

OPTION = re.compile(r"--([a-z][a-z0-9]*(?:-[a-z0-9]+)+)")
# vLLM's arguments, which are no limits of ours.
ENGINE_OPTIONS = ("max_model_len", "limit_mm_per_prompt", "allowed_local_media_path")
KEYS = {
    **{name: f"images.{name}" for name in Images.model_fields},
    **{name: f"ingress.{name}" for name in Ingress.model_fields},
    **{option: f"live.{key}" for key, option in LIVE_OPTIONS.items()},
    **{name: f"engine.{name}" for name in ENGINE_OPTIONS},
}


def name_keys(message: str) -> str:
    """Return a message with options of casa-serve replaced by the cluster's keys; other options are unchanged."""
    return OPTION.sub(lambda found: KEYS.get(found[1].replace("-", "_"), found[0]), message)


class SettingNames:
    """Middleware that translates the messages of errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward everything; translate errors that are one JSON body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start: Message | None = None

        async def translate(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and message["status"] >= 400:
                # Held back, because its Content-Length depends on the body.
                start = message
                return
            if start is not None:
                if not message.get("more_body", False):
                    message = {**message, "body": translated(message.get("body", b""))}
                    headers = MutableHeaders(scope=start)
                    if message["body"] and "content-length" in headers:
                        headers["content-length"] = str(len(message["body"]))
                await send(start)
                start = None
            await send(message)

        await self._app(scope, receive, translate)


def translated(body: bytes) -> bytes:
    """Return the body of an error with a translated message; other bodies unchanged."""
    if b"--" not in body:
        return body
    try:
        answer = json.loads(body)
        answer["error"]["message"] = name_keys(answer["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
