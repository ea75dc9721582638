"""HTTP errors for failures between the ingress and a replica: the one place that maps exceptions."""

from __future__ import annotations

import math

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError

from casa_serving.errors import add_error_handlers, error_response, handle_internal_error

REPLICA_LOST = "The replica that was answering has died. Send the request again; another one will answer."


def retry_after(seconds: float | None) -> dict[str, str]:
    """Return the header Retry-After; empty for None."""
    return {"Retry-After": str(max(1, math.ceil(seconds or 1)))}


class UnavailableError(Exception):
    """A request that no replica can accept now.

    Ray Serve's own exceptions for this do not reach our handlers: it registers its own in every
    application, after ours, which respond with plain text.

    Attributes:
        kind: The error's type in the response.
        status: HTTP status.
        retry_after_s: Seconds, for the header Retry-After.
    """

    def __init__(self, message: str, kind: str, status: int, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.kind, self.status, self.retry_after_s = kind, status, retry_after_s


def overloaded(error: BackPressureError) -> UnavailableError:
    """Return the error for full replicas and a full queue."""
    # Ray's exception has no attribute for it.
    _, max_queued_requests, *_ = error.args
    message = (
        f"All replicas are busy and {max_queued_requests} requests wait already. Try again after the "
        "time in the Retry-After header."
    )
    return UnavailableError(message, "OverloadedError", error.status_code, error.retry_after_s)


def unavailable(error: Exception) -> UnavailableError:
    """Return the error for replicas that died one after the other, or a deployment that is being deleted."""
    message = REPLICA_LOST if isinstance(error, RayError) else "No replica is available. Try again in a moment."
    return UnavailableError(message, "ServiceUnavailableError", 503, 1)


async def handle_unavailable(request: Request, error: UnavailableError) -> JSONResponse:
    """Return the response for `UnavailableError`."""
    return error_response(error.status, str(error), error.kind, headers=retry_after(error.retry_after_s))


def add_cluster_error_handlers(app: FastAPI) -> None:
    """Register the handlers of this module, and those that all our servers share. Mutates `app`."""
    add_error_handlers(app)
    app.add_exception_handler(UnavailableError, handle_unavailable)
    app.add_exception_handler(RayError, handle_internal_error)
