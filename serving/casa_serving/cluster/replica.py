"""A replica: Ray Serve LLM's server around one vLLM engine with the CASA plugin."""

from __future__ import annotations

import base64
import json
import logging
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from io import BytesIO
from pathlib import Path
from typing import Any

import ray
from PIL import Image
from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from casa_serving.cluster.asgi_call import call_app
from casa_serving.cluster.autoscaling import LIVE_FRAMES, LIVE_LATE_FRAMES, LIVE_SESSIONS
from casa_serving.cluster.forwarded import ForwardedRequest, ResponseHead
from casa_serving.cluster.live.replica_server import LiveServer
from casa_serving.cluster.live.session_ticket import SessionRejection, SessionTicket
from casa_serving.cluster.replica_metrics import ReplicaMetrics, last_step_s
from casa_serving.cluster.routing_context import RoutingContext
from casa_serving.drain.open_requests import StreamErrors
from casa_serving.endpoint.api_key import key_header
from casa_serving.engine_defaults import HTTP_PLUGIN, enable_endpoints
from casa_serving.live.connection import LiveService
from casa_serving.live.endpoint import open_service
from casa_serving.options.image_limits import ImageLimits
from casa_serving.options.live_options import LiveOptions

LOGGER = logging.getLogger("ray.serve")
# An engine that has run a step within this time needs no probe, which would queue behind its requests.
FRESH_S = 5.0
WARM_UP_SIDE = 56
CHAT_PATH = "/v1/chat/completions"
MAX_SHOWN = 500


class UnhealthyError(RuntimeError):
    """A probe through the request path failed; Ray Serve replaces the replica."""


class CasaServer(LLMServer):
    """Serves one engine; ready when a request with an image has succeeded.

    Args:
        llm_config: Ray Serve LLM's own.
        live_options: Limits on live sessions.
        **kwargs: Others of `LLMServer`'s.
    """

    async def __init__(self, llm_config: LLMConfig, *, live_options: LiveOptions, **kwargs: Any) -> None:
        # Only the HTTP plugin: live sessions have a server of their own here.
        enable_endpoints([HTTP_PLUGIN])
        self._live_options = live_options
        self._live: LiveServer | None = None
        await super().__init__(llm_config, **kwargs)

    async def start(self) -> None:
        """Start the engine and warm it up with one request of each kind."""
        self._metrics = ReplicaMetrics(serve.get_replica_context().replica_id.unique_id)
        await super().start()
        # The application of casa-serve without its request guard, which runs in the ingress.
        self._app = StreamErrors(await self.engine.build_asgi_app())
        for name, request in warm_up_requests(self._llm_config.model_id).items():
            started = time.monotonic()
            await self._probe(request)
            LOGGER.info("Warm-up: %s took %.2f s", name, time.monotonic() - started)
        if self._live_options.live_max_sessions:
            await self._start_live()

    async def live(self, context: RoutingContext) -> AsyncGenerator[SessionTicket | SessionRejection, None]:
        """Reserve a slot for a live session; called by the ingress (live/proxy.py).

        Args:
            context: For the router, which has read it already.

        Yields:
            The ticket, or the reason for the rejection; ends with the session.
        """
        if self._live is None:
            yield SessionRejection("live sessions are turned off")
            return
        async with aclosing(self._live.reserve_session()) as tickets:
            async for ticket in tickets:
                yield ticket

    async def http(
        self, request: ForwardedRequest, context: RoutingContext
    ) -> AsyncGenerator[ResponseHead | bytes, None]:
        """Run an HTTP request; called by the ingress.

        Args:
            request: The client's request.
            context: For the router, which has read it already.

        Yields:
            The head of the response with the first chunk of its body, then further chunks.
        """
        try:
            async with aclosing(call_app(self._app, request)) as parts:
                async for part in parts:
                    # vLLM's error about a dead engine must not reach the client: the ingress tries another replica.
                    self._exit_if_engine_died()
                    yield part
        finally:
            self._exit_if_engine_died()

    async def check_health(self) -> None:
        """Check the engine, and generate one token unless it has run a step recently.

        Raises:
            UnhealthyError: The request path does not return a completion.
        """
        await super().check_health()
        if time.time() - last_step_s() > FRESH_S:
            await self._probe(chat_body(self._llm_config.model_id, "ok"))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve every few seconds for the autoscaling policy; exports metrics at the same pace."""
        self._metrics.export()
        if self._live is None:
            return {LIVE_SESSIONS: 0.0}
        frames, late = self._live.frames.sample()
        return {LIVE_SESSIONS: float(self._live.num_sessions), LIVE_FRAMES: frames, LIVE_LATE_FRAMES: late}

    async def _start_live(self) -> None:
        """Warm up with one frame, then start the server of live sessions."""
        limits = ImageLimits.from_options(self._llm_config.engine_kwargs["media_io_kwargs"]["image"])
        checkpoint = Path(self._llm_config.model_loading_config.model_source)
        service = open_service(self.engine._engine_client, checkpoint, self._live_options, limits)
        started = time.monotonic()
        await caption_one(service)
        LOGGER.info("Warm-up: a live frame took %.2f s", time.monotonic() - started)
        self._live = LiveServer(service)
        await self._live.start(ray.util.get_node_ip_address())

    def _exit_if_engine_died(self) -> None:
        """Exit this process if the engine has died, so that Ray Serve and the ingress detect it immediately.

        Failed health checks would take most of a minute, during which a replica that fails every request immediately is
        always the least loaded one.
        """
        if self.engine._engine_client.errored:
            LOGGER.error("The engine has died; its replica ends with it")
            os._exit(1)

    async def _probe(self, body: dict[str, Any]) -> None:
        """Run a chat request.

        Raises:
            UnhealthyError: It fails.
        """
        headers = {"content-type": "application/json", **key_header()}
        pairs = tuple((name.lower().encode(), value.encode()) for name, value in headers.items())
        request = ForwardedRequest("POST", CHAT_PATH, CHAT_PATH.encode(), b"", pairs, json.dumps(body).encode())
        answer = b""
        async for part in self.http(request, RoutingContext()):
            if not isinstance(part, ResponseHead):
                answer += part
                continue
            answer += part.body
            if part.status != 200:
                raise UnhealthyError(f"A probe was answered with {part.status}: {part.body[:MAX_SHOWN]!r}")
        if not answer:
            raise UnhealthyError("A probe was answered with nothing.")


async def caption_one(service: LiveService) -> None:
    """Caption a gray frame; do nothing if the checkpoint does not support live sessions."""
    if not service.engine.config.is_cross_attention:
        return
    session = await service.engine.open(service.engine.defaults)
    try:
        async for _ in session.caption(Image.new("RGB", (WARM_UP_SIDE, WARM_UP_SIDE), "gray"), 0.0):
            pass
    finally:
        await session.close()


def chat_body(model: str, text: str, *images: str, **options: Any) -> dict[str, Any]:
    """Return the body of a request for one token.

    Args:
        model: The model's name.
        text: The text of the message.
        *images: Data URLs.
        **options: Other fields of the request.
    """
    content = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    return {"model": model, "messages": [message], "max_tokens": 1, "temperature": 0, **options}


def warm_up_requests(model: str) -> dict[str, dict[str, Any]]:
    """Return warm-up requests by name: a text, an image and a stream, which use different code."""
    picture = BytesIO()
    Image.new("RGB", (WARM_UP_SIDE, WARM_UP_SIDE), "gray").save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    return {
        "text": chat_body(model, "ok"),
        "image": chat_body(model, "ok", url),
        "stream": chat_body(model, "ok", url, stream=True),
    }
