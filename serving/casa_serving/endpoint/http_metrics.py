"""vLLM's HTTP metrics (`http_requests_total` and others), which count what the guard rejects as well."""

import inspect

from fastapi import FastAPI
from prometheus_fastapi_instrumentator import metrics
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.middleware import Middleware


def keep_metrics(app: FastAPI) -> None:
    """Register the metrics now, for every later instance of their middleware; call it before the first is built.

    An instance registers metrics of its own and counts nothing where they are registered already, and the stack is
    built twice: by SageMaker's standards, which vLLM puts around the app, and by `HttpEndpoint`.

    Mutates:
        app: Arguments of the middleware.
    """
    for middleware in _instrumentators(app):
        names = inspect.signature(metrics.default).parameters
        count = metrics.default(**{name: value for name, value in middleware.kwargs.items() if name in names})
        if count is not None:  # It is None where this process has registered them before.
            middleware.kwargs["instrumentations"] = [count]


def count_every_request(app: FastAPI) -> None:
    """Move the metrics' middleware outside the guard and the drain; call it before the last stack is built.

    Mutates:
        app: Order of its middleware.
    """
    for middleware in _instrumentators(app):
        app.user_middleware.remove(middleware)
        app.user_middleware.insert(0, middleware)


def _instrumentators(app: FastAPI) -> list[Middleware]:
    return [middleware for middleware in app.user_middleware if middleware.cls is PrometheusInstrumentatorMiddleware]
