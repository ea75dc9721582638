"""HTTP answers for what can go wrong between the ingress and a replica: the one place that maps errors."""

from __future__ import annotations

import math

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError

from casa_serving.errors import add_error_handlers, error_response, handle_internal_error

REPLICA_LOST = "The replica that was answering has died. Send the request again; another one will answer."


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


async def handle_unavailable(request: Request, error: UnavailableError) -> JSONResponse:
    """Nobody takes the request now."""
    return error_response(error.status, str(error), error.kind, headers=retry_after(error.retry_after_s))


def add_cluster_error_handlers(app: FastAPI) -> None:
    """Registers every answer of this module, and those of every server of ours. Mutates `app`."""
    add_error_handlers(app)
    app.add_exception_handler(UnavailableError, handle_unavailable)
    app.add_exception_handler(RayError, handle_internal_error)
