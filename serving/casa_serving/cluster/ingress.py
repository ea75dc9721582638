"""The HTTP side of a cluster: forwards every request to a replica unchanged, and its response back.

The ingress reads a body once, to apply the limits and to compute the digests of its images for the
router. All other validation is done by the replica's application, which is casa-serve's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import Response, StreamingResponse
from ray.exceptions import ObjectLostError, RayActorError, RayError
from ray.serve._private.http_util import session_id_from_headers
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.llm.ingress import make_fastapi_ingress

from casa_serving.cluster.error_responses import (
    REPLICA_LOST,
    UnavailableError,
    add_cluster_error_handlers,
    overloaded,
    unavailable,
)
from casa_serving.cluster.forwarded import ForwardedRequest, ResponseHead
from casa_serving.cluster.image_digests import request_image_keys
from casa_serving.cluster.live.proxy import LiveProxy
from casa_serving.cluster.routing_context import RoutingContext
from casa_serving.cluster.setting_names import SettingNames
from casa_serving.cluster.shutdown import RequestDrain, end_requests
from casa_serving.drain.final_messages import end_of_stream
from casa_serving.endpoint.request_guard import RequestGuard
from casa_serving.engine_defaults import MAX_IMAGES
from casa_serving.errors import INTERNAL_ERROR_MESSAGE, error_response
from casa_serving.live import web_files
from casa_serving.live.protocol import PATH as LIVE_PATH
from casa_serving.options.request_limits import RequestLimits

LOGGER = logging.getLogger("ray.serve")
# A request whose replica died is sent to another one, once: it may have killed the first.
MAX_ATTEMPTS = 2
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
# Paths that describe one engine, and here would describe an arbitrary replica.
ONE_ENGINE_ONLY = {
    "/metrics": "The metrics of all replicas are at each node's Prometheus endpoint (--metrics-port, docs/cluster.md).",
    "/load": "The load of all replicas is in the metrics at each node's Prometheus endpoint (docs/cluster.md).",
}
ENDPOINTS = {
    "health": lambda app: app.get("/health"),
    "ping": lambda app: app.api_route("/ping", methods=["GET", "POST"]),
    "forward": lambda app: app.api_route("/{path:path}", methods=METHODS),
}
LIVE_ENDPOINTS = {"live": lambda app: app.websocket(LIVE_PATH)}


class CasaIngress:
    """Forwards requests, and tries another replica when one dies.

    Args:
        replicas: The deployment of `CasaServer`.
    """

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(stream=True)
        self._live = LiveProxy()

    async def health(self) -> Response:
        """Return 200 while this ingress runs; Ray Serve checks the replicas itself."""
        return Response()

    async def end(self, finish_s: float) -> None:
        """Drain this ingress: end requests and sessions; called on every ingress before the cluster shuts down.

        Args:
            finish_s: Seconds for open requests to finish.
        """
        await asyncio.gather(self._live.end(), end_requests(self.app.state, finish_s))

    async def ping(self) -> Response:
        """See `health`; SageMaker's name for it."""
        return Response()

    async def forward(self, request: Request) -> Response:
        """Return a replica's response to any other request; its headers name the replica.

        Raises:
            UnavailableError: No replica accepts the request, or every one that was tried died.
        """
        message = ONE_ENGINE_ONLY.get(request.url.path)
        if message is not None:
            return error_response(404, message)
        body = await request.body()
        context = RoutingContext(images=request_image_keys(request.headers, body)[:MAX_IMAGES])
        parts = self._call_replica(ForwardedRequest.from_scope(request.scope, body), context, request.headers)
        head = await anext(parts)
        if head.is_complete:
            await parts.aclose()
            response = Response(head.body, head.status)
        else:
            response = StreamingResponse(body_of(head, parts), head.status)
        response.raw_headers = [*head.headers, *context.response_header_pairs()]
        return response

    async def live(self, websocket: WebSocket) -> None:
        """Handle the WebSocket of a live session (docs/live.md)."""
        handle = self._handle_for(websocket.headers)

        async def reserve(context: RoutingContext) -> AsyncGenerator[Any, None]:
            answers = handle.live.remote(context)
            try:
                async for answer in answers:
                    yield answer
            finally:
                context.finished = True
                answers.cancel()

        await self._live.serve(websocket, reserve)

    def _handle_for(self, headers: Any) -> DeploymentHandle:
        """Return a handle with the session of the request's headers, if they name one."""
        session = session_id_from_headers(headers)
        return self._replicas.options(session_id=session) if session else self._replicas

    async def _call_replica(
        self, request: ForwardedRequest, context: RoutingContext, headers: Any
    ) -> AsyncGenerator[ResponseHead | bytes, None]:
        """Call a replica; try another one if it dies before its response has begun.

        Yields:
            What the replica yields; after its death in the middle of a stream, an error event.

        Raises:
            UnavailableError: See `forward`.
        """
        call = self._handle_for(headers).http
        try:
            for attempt in range(1, MAX_ATTEMPTS + 1):
                head, last = None, b""
                try:
                    answers = call.remote(request, context)
                    async for part in answers:
                        head = head or part
                        last = head.body if part is head else part
                        yield part
                    return
                except BackPressureError as error:
                    raise overloaded(error) from error
                except (RayActorError, ObjectLostError, RayServeException) as error:
                    if head is not None:
                        yield stream_error(request.path, head, last, REPLICA_LOST, "ReplicaLostError", 503)
                        return
                    if attempt == MAX_ATTEMPTS or isinstance(error, RayServeException):
                        raise unavailable(error) from error
                    context.reset_for_retry()
                except RayError:
                    if head is None:
                        raise
                    LOGGER.exception("A replica failed in the middle of an answer")
                    yield stream_error(request.path, head, last, INTERNAL_ERROR_MESSAGE, "InternalServerError", 500)
                    return
        finally:
            context.finished = True


def stream_error(path: str, head: ResponseHead, last: bytes, message: str, kind: str, status: int) -> bytes:
    """Return the error event that ends a response whose replica has failed, in the format of the path's API.

    Raises:
        UnavailableError: The response is no stream of events, which cannot carry an error; the connection is aborted.
    """
    if not dict(head.headers).get(b"content-type", b"").startswith(b"text/event-stream"):
        raise UnavailableError(message, kind, status, None)
    return end_of_stream(path, message, last, status, kind)["body"]


async def body_of(head: ResponseHead, parts: AsyncIterator[ResponseHead | bytes]) -> AsyncIterator[bytes]:
    """Yield the whole body of a response whose head has been read."""
    yield head.body
    async with contextlib.aclosing(parts):
        async for part in parts:
            yield part


def ingress_class(
    limits: RequestLimits, max_prompt_chars: int, *, page_model: dict[str, str | list[str]] | None
) -> type:
    """Return the deployment class of the ingress, with its routes and its limits on requests.

    Args:
        limits: Limits on requests.
        max_prompt_chars: Characters of the longest text that can fit into the model's context.
        page_model: What the web page of live sessions says about the model; None: there are no such sessions.
    """
    # No other routes, which would hide those of the replica's application.
    app = FastAPI(title="casa-engine", openapi_url=None)
    # RequestGuard reads its settings here, as in casa-serve; no other origin is allowed.
    app.state.args = Namespace(**asdict(limits), allowed_origins=[])
    app.state.max_prompt_chars = max_prompt_chars
    # The last one is the outermost.
    app.add_middleware(RequestGuard)
    app.add_middleware(SettingNames)
    app.add_middleware(RequestDrain)
    add_cluster_error_handlers(app)
    live = page_model is not None
    if live:
        app.state.page_model = page_model
        web_files.attach(app)
    # The last route matches all remaining paths.
    endpoints = {**(LIVE_ENDPOINTS if live else {}), **ENDPOINTS}
    return make_fastapi_ingress(CasaIngress, endpoint_map=endpoints, app=app)
