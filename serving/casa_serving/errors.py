"""Errors in OpenAI's format: one body, one conversion of validation errors to messages, one set of handlers.

    {"error": {"message": "...", "type": "BadRequestError", "param": "messages.0.content", "code": 400}}

Input is never quoted: a request of 2 MB whose every validation error quoted it became a response of
466 MB. Messages are truncated, and so is the number of validation errors that are read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from itertools import islice
from traceback import walk_tb
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.dependencies.utils import request_body_to_args
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse

from casa_engine.errors import CasaError

LOGGER = logging.getLogger("uvicorn.error")
INTERNAL_ERROR_MESSAGE = "The server failed to answer. The fault is in its log."
MAX_MESSAGE_CHARACTERS = 2000
MAX_PROBLEMS_READ = 1000
MAX_PROBLEMS_NAMED = 3
MAX_PROBLEM_CHARACTERS = 200
MAX_PATH_CHARACTERS = 100

KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "OverloadedError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}
# pydantic's own steps in the path to a field: names of types and of validators. Fields are in snake case.
FIELD = re.compile(r"[a-z_][a-z0-9_]*")
TYPES = frozenset(
    "str int float bool bytes bytearray list tuple dict set frozenset none nullable union chain default call "
    "constrained-str constrained-int url body".split()
)
# Parts of messages that are removed: input values (pydantic, vLLM), time and source line (xgrammar).
NOTES = re.compile(
    r"\s*\[type=\w+, input_value=.*?(, input_type=[\w.]+)?\]|\s*For further information visit \S+"
    r"|\[\d\d:\d\d:\d\d\] \S+:\d+: "
    r"|\s*\(parameter=[\w.]+(, value=.*)?\)?\Z",
    re.DOTALL,
)


class RequestError(CasaError):
    """An error response to a request.

    Args:
        status: HTTP status.
        message: What, got, expected, how to fix.
        param: The field that is invalid.
        headers: Further headers of the response.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.headers = status, param, headers

    def response(self) -> JSONResponse:
        """Return the response."""
        return error_response(self.status, str(self), param=self.param, headers=self.headers)


def error_kind(status: int) -> str:
    """Return the `type` of an error with this status."""
    return KINDS.get(status) or HTTPStatus(status).phrase


def error_body(status: int, message: str, kind: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's shape."""
    error = {"message": shorten(message), "type": kind or error_kind(status), "param": param, "code": status}
    return {"error": error}


def error_response(
    status: int,
    message: str,
    kind: str | None = None,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return an error as a response."""
    return JSONResponse(error_body(status, message, kind, param), status, headers)


def shorten(message: str, limit: int = MAX_MESSAGE_CHARACTERS) -> str:
    """Return a message without quoted input, truncated to `limit` characters."""
    # First, so that the patterns do not run over megabytes.
    message = NOTES.sub("", message[: 2 * limit])
    # A lone surrogate cannot be encoded, not even in an error about it.
    message = message.encode(errors="replace").decode()
    return message if len(message) <= limit else message[: limit - 4] + " ..."


def describe_validation(errors: Iterable[Any]) -> tuple[str, str | None]:
    """Return an error message for a validation error, and the first field that it names.

    A union reports every alternative that did not match. They are collapsed: each field is named
    once, and not at all if a field inside it is named.

    Args:
        errors: `errors()` of pydantic or FastAPI, or plain strings.
    """
    problems: dict[str, str] = {}
    for error in islice(errors, MAX_PROBLEMS_READ):
        if isinstance(error, Mapping):
            problems.setdefault(field_path(error.get("loc", ())), problem_text(error))
        else:
            problems.setdefault("", str(error))
    inner = {path: text for path, text in problems.items() if not is_parent(path, problems)}
    named = [f"{path}: {text}" if path else text for path, text in islice(inner.items(), MAX_PROBLEMS_NAMED)]
    more = len(inner) - len(named)
    sentence = "; ".join(shorten(text, MAX_PROBLEM_CHARACTERS) for text in named)
    return f"The request is not understood: {sentence}{f'; and {more} more' if more else ''}.", next(
        iter(inner), None
    ) or None


def is_parent(path: str, paths: Iterable[str]) -> bool:
    """Return whether one of the paths leads to something inside `path`."""
    prefix = f"{path}." if path else ""
    return any(other != path and other.startswith(prefix) for other in paths)


def field_path(steps: Iterable[Any]) -> str:
    """Return the path of a field, such as `messages.0.content`, of an error's `loc`."""
    kept = [str(step) for step in steps if isinstance(step, int) or (FIELD.fullmatch(step) and step not in TYPES)]
    return ".".join(kept)[:MAX_PATH_CHARACTERS]


def problem_text(error: Mapping[str, Any]) -> str:
    """Return the message of a validation error without the input value."""
    cause = error.get("ctx", {}).get("error")
    # str() of vLLM's own exceptions includes the value.
    if isinstance(cause, Exception) and cause.args and isinstance(cause.args[0], str):
        return cause.args[0].rstrip(".")
    return str(error.get("msg", "is not valid")).removeprefix("Value error, ")


async def handle_validation_error(request: Request, error: RequestValidationError | ValidationError) -> JSONResponse:
    """Return 400 for an invalid body."""
    message, param = describe_validation(error.errors())
    return error_response(400, message, param=param)


async def handle_http_exception(request: Request, error: StarletteHTTPException) -> JSONResponse:
    """Return the error of the router, such as an unknown path or method."""
    message = str(error.detail)
    if error.status_code in (404, 405) and message == HTTPStatus(error.status_code).phrase:
        there_is = "no such path" if error.status_code == 404 else f"no method {request.method[:20]} at this path"
        message = f"There is {there_is} on this server."
    return error_response(error.status_code, message, headers=error.headers)


async def handle_request_error(request: Request, error: RequestError) -> JSONResponse:
    """Return the error of a request that our own code rejects."""
    return error.response()


async def handle_internal_error(request: Request, error: Exception) -> JSONResponse:
    """Return 500; Starlette re-raises the exception into the log after this response."""
    return error_response(500, INTERNAL_ERROR_MESSAGE)


async def handle_lookup_failure(request: Request, error: Exception) -> JSONResponse:
    """Return an error for code that assumed a wrong type: 400 while a body is validated, otherwise 500.

    vLLM's models read some fields before pydantic has checked their types.
    """
    if raised_in_validation(error):
        return error_response(400, "The request is not understood: a field is not of the kind that it must be.")
    LOGGER.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(500, INTERNAL_ERROR_MESSAGE)


def raised_in_validation(error: BaseException) -> bool:
    """Return whether an exception was raised while FastAPI validated a body."""
    validators = request_body_to_args.__code__
    return any(frame.f_code is validators for frame, _ in walk_tb(error.__traceback__))


def add_error_handlers(app: FastAPI) -> None:
    """Register the handlers above. Mutates `app`."""
    app.add_exception_handler(RequestError, handle_request_error)
    app.add_exception_handler(RequestValidationError, handle_validation_error)
    app.add_exception_handler(ValidationError, handle_validation_error)
    # FastAPI's is a subclass of Starlette's, which the router raises; vLLM has a handler for the former alone.
    app.add_exception_handler(HTTPException, handle_http_exception)
    app.add_exception_handler(StarletteHTTPException, handle_http_exception)
    for kind in (AttributeError, LookupError):
        app.add_exception_handler(kind, handle_lookup_failure)
    app.add_exception_handler(Exception, handle_internal_error)
