"""HTTP answers for what can go wrong between the ingress and a replica: the one place that maps errors."""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayError
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
from ray.serve.exceptions import BackPressureError
from starlette.exceptions import HTTPException

FAILED = "The server failed to answer. The fault is in its log."
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


class UnavailableError(Exception):
    """A request that no replica takes now.

    Ray Serve's own exceptions for this do not reach a handler of ours: it registers its own for
    them in every application, after ours, which answers plain text.

    Attributes:
        kind: The error's type in the answer.
        status: HTTP's.
        retry_after_s: When to come back.
    """

    def __init__(self, message: str, kind: str, status: int, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.kind, self.status, self.retry_after_s = kind, status, retry_after_s


def overloaded(error: BackPressureError) -> UnavailableError:
    """All replicas are full and so is the queue."""
    # It has no attribute for it.
    _, max_queued_requests, *_ = error.args
    message = (
        f"All replicas are busy and {max_queued_requests} requests wait already. Try again after the "
        "time in the Retry-After header."
    )
    return UnavailableError(message, "OverloadedError", error.status_code, error.retry_after_s)


def unavailable(error: Exception) -> UnavailableError:
    """No replica could answer: they died one after the other, or the deployment is going."""
    message = REPLICA_LOST if isinstance(error, RayError) else "No replica is available. Try again in a moment."
    return UnavailableError(message, "ServiceUnavailableError", 503, 1)


async def not_taken(request: Request, error: UnavailableError) -> JSONResponse:
    """Nobody takes the request now."""
    return respond(str(error), error.kind, error.status, retry_after(error.retry_after_s))


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
    return respond(FAILED, "InternalServerError", 500)


def add_error_handlers(app: FastAPI) -> None:
    """Registers every answer of this module. Mutates `app`."""
    app.add_exception_handler(UnavailableError, not_taken)
    app.add_exception_handler(RayError, broken)
    app.add_exception_handler(OpenAIHTTPException, refused)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, not_understood)
    app.add_exception_handler(Exception, broken)
