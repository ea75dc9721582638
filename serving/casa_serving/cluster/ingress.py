"""The HTTP side of a cluster: Ray Serve LLM's OpenAI ingress, with CASA's limits, routing and retries."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import Response
from ray.exceptions import ObjectLostError, RayActorError, RayError
from ray.llm._internal.serve.core.ingress.ingress import _sanitize_chat_completion_request
from ray.serve._private.http_util import session_id_from_headers
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

from casa_serving.cluster.answers import (
    REPLICA_LOST,
    add_cluster_error_handlers,
    error_event,
    overloaded,
    unavailable,
)
from casa_serving.cluster.image_keys import image_keys
from casa_serving.cluster.live_proxy import LiveProxy
from casa_serving.cluster.routing_note import RoutingNote
from casa_serving.defaults import MAX_IMAGES
from casa_serving.errors import FAILED
from casa_serving.live import page
from casa_serving.live.protocol import PATH as LIVE_PATH
from casa_serving.request_guard import RequestGuard
from casa_serving.request_limits import RequestLimits

LOGGER = logging.getLogger("ray.serve")
# A request that met a dying replica is given to another, once: it may be what killed the first.
MAX_ATTEMPTS = 2
ENDPOINTS = {
    "health": lambda app: app.get("/health"),
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "completions": lambda app: app.post("/v1/completions"),
    "tokenize": lambda app: app.post("/tokenize"),
    "detokenize": lambda app: app.post("/detokenize"),
}
LIVE_ENDPOINTS = {"live": lambda app: app.websocket(LIVE_PATH)}


class CasaIngress(OpenAiIngress):
    """Parses requests, names their images, and hands them to a replica."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._live = LiveProxy()

    async def _get_model_id(self, model: str | None) -> str:
        """Returns the model's name if it is served; Ray would take what follows a colon in it for an adapter's.

        Raises:
            HTTPException: 404: it is not.
        """
        name = await super()._get_model_id(model)
        if name not in self._model_cards:
            raise HTTPException(404, f"There is no model {name!r} here: GET /v1/models names what there is.")
        return name

    async def health(self) -> Response:
        """Answers 200 while this ingress runs; Ray Serve checks the replicas itself."""
        return Response()

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """A chat completion; the answer's headers say where it came from."""
        return with_routing(await super().chat(body, request), request)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """A completion of a text."""
        return with_routing(await super().completions(body, request), request)

    async def live(self, websocket: WebSocket) -> None:
        """A live session (docs/live.md)."""
        handle = self._get_configured_serve_handle(await self._get_model_id(None))
        session = session_id_from_headers(websocket.headers)
        if session:
            handle = handle.options(session_id=session)

        async def ask(note: RoutingNote) -> AsyncGenerator[Any, None]:
            answers = handle.live.remote(note)
            try:
                async for answer in answers:
                    yield answer
            finally:
                note.finished = True
                answers.cancel()

        await self._live.serve(websocket, ask)

    async def _get_response(
        self, *, body: Any, call_method: str, raw_request: Request | None = None
    ) -> AsyncIterator[Any]:
        """Calls a replica; takes another when it dies before it has answered anything.

        Yields:
            What the replica yields; after its death in the middle of a stream, an error event.

        Raises:
            UnavailableError: No replica takes the request, or every one that was asked died.
        """
        if isinstance(body, ChatCompletionRequest):
            body = _sanitize_chat_completion_request(body)
        handle = self._get_configured_serve_handle(await self._get_model_id(body.model))
        headers = raw_request.headers if raw_request is not None else {}
        session = session_id_from_headers(headers)
        if session:
            handle = handle.options(session_id=session)
        images = image_keys(getattr(body, "messages", None))[:MAX_IMAGES]
        note = RoutingNote(headers=dict(headers), images=images)
        if raw_request is not None:
            raw_request.state.routing = note
        try:
            async for item in self._from_a_replica(getattr(handle, call_method), body, note):
                yield item
        finally:
            note.finished = True

    async def _from_a_replica(self, call: Any, body: Any, note: RoutingNote) -> AsyncIterator[Any]:
        """See `_get_response`, whose requests have a note."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            begun = False
            try:
                async for item in call.remote(body, note):
                    begun = True
                    yield item
                return
            except BackPressureError as error:
                raise overloaded(error) from error
            except (RayActorError, ObjectLostError, RayServeException) as error:
                if begun:
                    yield error_event(REPLICA_LOST, "ReplicaLostError", 503)
                    return
                if attempt == MAX_ATTEMPTS or isinstance(error, RayServeException):
                    raise unavailable(error) from error
                note.start_again()
            except RayError:
                if not begun:
                    raise
                LOGGER.exception("A replica failed in the middle of a stream")
                yield error_event(FAILED, "InternalServerError", 500)
                return


def with_routing(response: Response, request: Request) -> Response:
    """Adds to an answer which replica gave it. Mutates `response`."""
    note = getattr(request.state, "routing", None)
    if note is not None:
        response.headers.update(note.response_headers())
    return response


def ingress_class(limits: RequestLimits, max_prompt_chars: int, *, live: bool) -> type:
    """Returns the deployment class of the ingress, with its routes and its limits on requests.

    Args:
        limits: What a request may hold.
        max_prompt_chars: Characters of the longest text that can fit into the model's context.
        live: Whether there are live sessions, and the web page for them.
    """
    app = FastAPI(title="casa-engine", docs_url=None, redoc_url=None)
    # Where RequestGuard finds its settings, as in casa-serve; pages of other origins have no business here.
    app.state.args = Namespace(**asdict(limits), allowed_origins=[])
    app.state.max_prompt_chars = max_prompt_chars
    app.add_middleware(RequestGuard)
    add_cluster_error_handlers(app)
    if live:
        page.attach(app)
    endpoints = {**ENDPOINTS, **LIVE_ENDPOINTS} if live else ENDPOINTS
    return make_fastapi_ingress(CasaIngress, endpoint_map=endpoints, app=app)
