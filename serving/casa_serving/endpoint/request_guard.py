"""ASGI middleware before everything else: keys, closed paths, limits on bodies, errors in OpenAI's format.

    request -> path closed? -> key -> kind of body -> read, counted and timed -> parsed, measured -> vLLM's own server
            <- an error of any layer in OpenAI's format <-

Neither uvicorn nor FastAPI limits a body, and an image inside JSON is visible only after all of it
is read and parsed. vLLM creates middleware without arguments, so the limits are read from
the server's own arguments, which it stores in the app's state.

The closed paths are internal ones between the parts of a disaggregated vLLM. They take image tensors
that another server has prepared, bypassing every check of images, and commands to resize the engine.
vLLM 0.29.0 exposes them to every client; 0.32.0 no longer does.
"""

from __future__ import annotations

import asyncio
import base64
import json
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from casa_serving.endpoint import responses_input
from casa_serving.endpoint.api_key import KeyCheck
from casa_serving.endpoint.error_shape import ErrorShape
from casa_serving.endpoint.http_server import configure_server
from casa_serving.endpoint.json_bounds import StructureCounter, parse_json
from casa_serving.endpoint.logprobs_bound import bound_logprobs
from casa_serving.endpoint.ready_line import announce
from casa_serving.endpoint.request_body import (
    BodyReader,
    BytesInFlight,
    ClientDisconnectedError,
    discard,
    replay,
    too_large,
)
from casa_serving.endpoint.request_fields import FieldChecker
from casa_serving.errors import RequestError
from casa_serving.options.request_limits import RequestLimits

# "casa-key." and the key in base64url; vLLM authenticates WebSockets under /v1 by their Authorization header.
KEY_PREFIX = "casa-key."
CLOSED_PATHS = ("/inference/", "/scale_elastic_ep", "/is_scaling_elastic_ep")
CLOSED_ENDINGS = ("/render", "/derender")
# A body over a limit is rejected before all of it is read; the connection cannot be reused.
CLOSE = {"Connection": "close"}


class RequestGuard:
    """See the module; also rejects WebSockets from pages of other origins."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        # Set at the first request: the app's state is set after its middleware.
        self._checks: Checks | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward valid requests and reject the others."""
        if scope["type"] == "lifespan":
            state = scope["app"].state
            # A cluster's ingress runs in Ray Serve's server and has none.
            if hasattr(state, "server"):
                configure_server(state.server, state.args)
                self._announcement = asyncio.create_task(announce(state.server, state.args))
            await self._app(scope, receive, send)
            return
        if self._checks is None:
            self._checks = Checks(scope)
        if scope["type"] == "websocket":
            await self._open_socket(self._checks, scope, receive, send)
        else:
            await self._answer(self._checks, scope, receive, send)

    async def _answer(self, checks: Checks, scope: Scope, receive: Receive, send: Send) -> None:
        send = ErrorShape(send)
        reader = BodyReader(checks.limits, checks.in_flight)
        try:
            checks.check_access(scope)
            if has_body(scope):
                receive = replay(await checks.read(scope, receive, reader), receive)
            # HEAD on every path that has GET; the HTTP server omits the body.
            forwarded_scope = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self._app(forwarded_scope, receive, send)
        except RequestError as error:
            # A client that waits for `100 Continue` has sent no body.
            if has_body(scope) and not reader.is_complete and not expects_continue(scope):
                await discard(receive)
            await error.response()(scope, receive, send)
        except ClientDisconnectedError:
            # Nobody reads it; without a response the metrics would count a 500.
            await RequestError(408, "The client disconnected before it had sent the request.").response()(
                scope, receive, send
            )
        finally:
            reader.release()

    async def _open_socket(self, checks: Checks, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if not is_allowed_origin(Headers(scope=scope), scope["app"].state.args.allowed_origins):
                raise RequestError(
                    403,
                    "Pages of this origin may not open a WebSocket here: the operator can name it in "
                    "--allowed-origins.",
                )
            move_key_to_header(scope)
            checks.key.check(route_path(scope), Headers(scope=scope))
        except RequestError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


class Checks:
    """The checks of a request, with the server's own settings.

    Args:
        scope: ASGI scope of any request to the app.
    """

    def __init__(self, scope: Scope) -> None:
        state = scope["app"].state
        self.limits = RequestLimits.from_options(vars(state.args))
        self.in_flight = BytesInFlight(self.limits.max_request_bytes_in_flight)
        self.key = KeyCheck(state.args)
        self._max_model_len = getattr(state, "max_model_len", None)
        self._fields = FieldChecker(self.limits, getattr(state, "max_prompt_chars", None))

    def check_access(self, scope: Scope) -> None:
        """Reject closed paths, and clients without the key.

        Raises:
            RequestError: 404 or 401.
        """
        path = route_path(scope)
        if path.startswith(CLOSED_PATHS) or path.rstrip("/").endswith(CLOSED_ENDINGS):
            raise RequestError(404, f"There is no {path[:100]!r} on this server.", headers=CLOSE)
        # As in vLLM: a browser's CORS preflight comes without the key.
        if scope["method"] != "OPTIONS":
            self.key.check(path, Headers(scope=scope))

    async def read(self, scope: Scope, receive: Receive, reader: BodyReader) -> bytes:
        """Return the body after checking it, changed where vLLM needs it.

        Raises:
            RequestError: 4xx: it is over a limit or no valid JSON.
            ClientDisconnectedError: The client has disconnected.
        """
        try:
            check_content_type(Headers(scope=scope))
            length = declared_length(scope)
            if length is not None and length > self.limits.max_request_bytes:
                raise too_large(str(length), self.limits.max_request_bytes)
            body = await reader.read(receive, StructureCounter(self.limits).feed)
        except RequestError as error:
            # The rest of the body may still be coming.
            error.headers = {**(error.headers or {}), **CLOSE}
            raise
        parsed = parse_json(body)
        if not isinstance(parsed, dict):
            return body  # FastAPI reports what is expected.
        text_chars = self._fields.check(parsed)
        changed = bound_logprobs(parsed, text_chars, self.limits, self._max_model_len)
        if route_path(scope) == responses_input.PATH:
            changed |= responses_input.set_image_detail(parsed)
            await responses_input.check_items(parsed)
        return json.dumps(parsed).encode() if changed else body


def route_path(scope: Scope) -> str:
    """Return the path as Starlette's router sees it, so that both agree on every path."""
    path, root_path = scope["path"], scope.get("root_path", "")
    return path[len(root_path) :] if path == root_path or path.startswith(f"{root_path}/") else path


def has_body(scope: Scope) -> bool:
    """Return whether a request has a body."""
    return (declared_length(scope) or 0) > 0 or any(name == b"transfer-encoding" for name, _ in scope["headers"])


def expects_continue(scope: Scope) -> bool:
    """Return whether a client waits for `100 Continue` before it sends its body."""
    return Headers(scope=scope).get("expect", "").lower() == "100-continue"


def declared_length(scope: Scope) -> int | None:
    """Return the request's Content-Length; the HTTP server has checked that it is a number."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)
    return None


def check_content_type(headers: Headers) -> None:
    """Reject bodies that are not plain JSON.

    A page of another origin may send a form or plain text without a CORS preflight, but not JSON.

    Raises:
        RequestError: 415.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise RequestError(
            415,
            f"Bodies with Content-Encoding {encoding[:40]!r} are not taken: a small one can hold a huge one. "
            "Send the JSON as it is.",
        )
    kind = headers.get("content-type", "").split(";", 1)[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, f"Bodies are taken as application/json, got {kind[:40]!r}. Set Content-Type.")


def is_allowed_origin(headers: Headers, allowed: list[str]) -> bool:
    """Return whether a WebSocket comes from this server's page, an allowed origin, or no page at all.

    Browsers do not apply CORS to WebSockets, but send the page's origin in `Origin`. Other clients send
    no such header.
    """
    origin = headers.get("origin")
    if origin is None or "*" in allowed or origin in allowed:
        return True
    try:
        return urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
    except ValueError:
        return False  # No browser sends such an origin.


def move_key_to_header(scope: Scope) -> None:
    """Move an API key from the offered subprotocols to the Authorization header, which vLLM reads.

    A page cannot set headers on a WebSocket, only subprotocols.

    Mutates:
        scope: Its headers and subprotocols; the key is never returned as the selected subprotocol.
    """
    offered = scope["subprotocols"]
    keys = [name.removeprefix(KEY_PREFIX) for name in offered if name.startswith(KEY_PREFIX)]
    scope["subprotocols"] = [name for name in offered if not name.startswith(KEY_PREFIX)]
    if not keys or any(name == b"authorization" for name, _ in scope["headers"]):
        return
    try:
        key = base64.urlsafe_b64decode(keys[0] + "=" * (-len(keys[0]) % 4))
    except ValueError:
        return  # No valid key: rejected if the server requires one.
    scope["headers"] = [*scope["headers"], (b"authorization", b"Bearer " + key)]
