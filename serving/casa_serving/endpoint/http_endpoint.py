"""Entry point `vllm.endpoint_plugins`: errors in OpenAI's format, and the model's limits for the request guard.

vLLM loads it in each API server process if `VLLM_PLUGINS` names it, which `casa-serve`
ensures (engine_defaults.py).
"""

from __future__ import annotations

from argparse import Namespace

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import JSONResponse
from vllm.engine.protocol import EngineClient

from casa_engine.errors import ConfigError
from casa_serving.endpoint.generate_patch import reject_failed_grammars
from casa_serving.endpoint.http_metrics import count_every_request, keep_metrics
from casa_serving.endpoint.messages_patch import preserve_stream_errors
from casa_serving.errors import add_error_handlers, error_response


class HttpEndpoint:
    """See vLLM's `EndpointPlugin`."""

    name = "casa_http"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add a route and store the app. Mutates `app`; see `http_metrics`."""
        self._app = app
        keep_metrics(app)
        app.add_api_route("/v1/models/{model_id:path}", show_model, methods=["GET"])

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Register the error handlers, after vLLM's own, and set what the guard reads.

        Mutates:
            state: `max_model_len`, `max_prompt_chars`, the models' `root`, which names the server's folder, and how
                `/v1/messages` ends a stream: see `messages_patch`.
            engine_client: See `generate_patch`.
        """
        if engine_client is None:
            raise ConfigError("casa_http needs an engine, which vLLM's render server does not have.")
        add_error_handlers(self._app)
        reject_failed_grammars(engine_client)
        preserve_stream_errors(state.anthropic_serving_messages)
        count_every_request(self._app)
        # SageMaker's standards, which vLLM puts around the app, have built it already.
        self._app.middleware_stack = self._app.build_middleware_stack()
        max_chars_per_token = engine_client.renderer.get_tokenizer().max_chars_per_token
        state.max_model_len = engine_client.model_config.max_model_len
        state.max_prompt_chars = state.max_model_len * max_chars_per_token
        for model in state.openai_serving_models.base_model_paths:
            model.model_path = model.name


async def show_model(request: Request, model_id: str) -> JSONResponse:
    """Return one model in the format of OpenAI's API."""
    models = await request.app.state.openai_serving_models.show_available_models()
    for model in models.data:
        if model.id == model_id:
            return JSONResponse(model.model_dump())
    return error_response(404, f"There is no model {model_id[:100]!r} here: GET /v1/models names what there is.")
