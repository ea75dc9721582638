"""Entry point `vllm.endpoint_plugins`: puts `/v1/live` and the web page into vLLM's server.

vLLM loads it in each API server process if `VLLM_PLUGINS` names it, which `casa-serve`
ensures (engine_defaults.py). Each process has its own sessions and its own limit.
"""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.websockets import WebSocket
from vllm.engine.protocol import EngineClient

from casa_engine.errors import ConfigError
from casa_serving.endpoint.media import GuardedImageIO
from casa_serving.engine_environment import CONNECTOR
from casa_serving.live import web_files
from casa_serving.live.connection import Connection, LiveService
from casa_serving.live.metrics import LiveMetrics
from casa_serving.live.protocol import PATH
from casa_serving.live.session import LiveEngine
from casa_serving.live.session_slots import SessionSlots
from casa_serving.options.image_limits import ImageLimits
from casa_serving.options.live_options import LiveOptions
from casa_vllm.api import metric_labels


class LiveEndpoint:
    """See vLLM's `EndpointPlugin`."""

    name = "casa_live"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        if os.environ.get("VLLM_MEDIA_CONNECTOR") != CONNECTOR:
            raise ConfigError("casa_live needs the guards of casa-serve: start the server with casa-serve.")

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes. Mutates `app`."""
        app.add_api_websocket_route(PATH, live)
        web_files.attach(app)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Set what the routes read, and the hook that closes sessions at shutdown.

        Mutates:
            state: `live`, `page_model`, `shutdown_hooks`.
        """
        if engine_client is None:
            raise ConfigError("casa_live needs an engine, which vLLM's render server does not have.")
        options = LiveOptions.from_arguments(vars(args))
        limits = ImageLimits.from_options(vars(args))
        state.live = open_service(engine_client, Path(args.model), options, limits)
        (model, *_) = state.openai_serving_models.base_model_paths
        state.page_model = web_files.page_model(model.name, Path(args.model))
        state.shutdown_hooks = [state.live.slots.close]


async def live(websocket: WebSocket) -> None:
    """Handle the WebSocket route `/v1/live`."""
    await Connection(websocket, websocket.app.state.live).run()


def open_service(
    engine_client: EngineClient, checkpoint: Path, options: LiveOptions, limits: ImageLimits
) -> LiveService:
    """Return what all sessions of this process share; once per process, since it registers metrics.

    Args:
        engine_client: vLLM's, of the model that it serves.
        checkpoint: The folder of that model.
        options: The operator's limits on sessions.
        limits: The operator's limits on images, which apply to frames.
    """
    metrics = LiveMetrics(metric_labels(engine_client.vllm_config))
    return LiveService(
        engine=open_engine(engine_client, checkpoint, options),
        options=options,
        slots=SessionSlots(options.live_max_sessions, metrics),
        metrics=metrics,
        image_io=GuardedImageIO(limits),
    )


def open_engine(engine_client: EngineClient, checkpoint: Path, options: LiveOptions) -> LiveEngine:
    """Return the engine, with a default text budget within the model's context and the operator's limit."""
    engine = LiveEngine(engine_client, checkpoint)
    longest = options.live_text_budget or engine.defaults.text_budget
    budget = min(engine.defaults.text_budget, longest, engine_client.model_config.max_model_len)
    engine.defaults = replace(engine.defaults, text_budget=budget)
    return engine
