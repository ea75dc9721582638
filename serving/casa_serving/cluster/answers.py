"""HTTP answers for what can go wrong between the ingress and a replica: the one place that maps errors."""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError, RayError
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.exceptions import HTTPException

REPLICA_LOST = "The replica that was answering has died. Send the request again; another one will answer."


def error_body(message: str, kind: str, status: int) -> dict[str, Any]:
    """Returns an error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def error_event(message: str, kind: str, status: int) -> str:
    """Returns an error as the last events of a stream that has begun."""
    return f"data: {json.dumps(error_body(message, kind, status))}\n\ndata: [DONE]\n\n"


def respond(message: str, kind: str, status: int, headers: dict[str, str] | None = None) -> JSONResponse:
    """Returns an error as a response."""
    return JSONResponse(error_body(message, kind, status), status, headers)


def retry_after(seconds: float | None) -> dict[str, str]:
    """Returns the header that tells a client when to come back."""
    return {"Retry-After": str(max(1, math.ceil(seconds or 1)))}


async def overloaded(request: Request, error: BackPressureError) -> JSONResponse:
    """All replicas are full and so is the queue."""
    message = (
        f"All replicas are busy and {error.max_queued_requests} requests wait already. Try again after the "
        "time in the Retry-After header."
    )
    return respond(message, "OverloadedError", error.status_code, retry_after(error.retry_after_s))


async def unavailable(request: Request, error: Exception) -> JSONResponse:
    """No replica could answer: they died one after the other, or the deployment is going."""
    message = REPLICA_LOST if isinstance(error, RayActorError) else "No replica is available. Try again in a moment."
    return respond(message, "ServiceUnavailableError", 503, retry_after(1))


async def refused(request: Request, error: OpenAIHTTPException) -> JSONResponse:
    """The engine refused the request, with a reason of its own."""
    headers = retry_after(1) if error.status_code in (429, 503) else None
    return respond(error.message, error.type or "BadRequestError", error.status_code, headers)


async def http_error(request: Request, error: HTTPException) -> JSONResponse:
    """What the routes themselves refuse, such as an unknown model."""
    kind = "NotFoundError" if error.status_code == 404 else "BadRequestError"
    return respond(str(error.detail), kind, error.status_code, error.headers)


async def not_understood(request: Request, error: RequestValidationError) -> JSONResponse:
    """The body is not what the API takes. What the client sent is not repeated."""
    problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:3])
    return respond(f"The request is not understood: {problems}.", "BadRequestError", 400)


async def broken(request: Request, error: Exception) -> JSONResponse:
    """A fault of ours; Starlette raises it on into the log after this answer."""
    return respond("The server failed to answer. The fault is in its log.", "InternalServerError", 500)


def add_error_handlers(app: FastAPI) -> None:
    """Registers every answer of this module. Mutates `app`."""
    app.add_exception_handler(BackPressureError, overloaded)
    app.add_exception_handler(RayActorError, unavailable)
    app.add_exception_handler(RayServeException, unavailable)
    app.add_exception_handler(RayError, broken)
    app.add_exception_handler(OpenAIHTTPException, refused)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, not_understood)
    app.add_exception_handler(Exception, broken)
