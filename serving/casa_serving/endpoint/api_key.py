"""Authentication: the key of `--api-key` or VLLM_API_KEY, on every path that is not public.

vLLM's own middleware protects the paths under /v1 and leaves the others open, some of which run the
model just as well (`/invocations`, `/generative_scoring`).
"""

from __future__ import annotations

import os
from argparse import Namespace

from starlette.datastructures import Headers

from casa_serving.errors import RequestError

VARIABLE = "VLLM_API_KEY"
# Health, metrics, and the page, in which the key is typed. None of them shows a request.
OPEN_PATHS = frozenset({"/", "/health", "/ping", "/metrics"})
OPEN_FOLDERS = ("/web/",)


def is_open(path: str) -> bool:
    """Return whether a path (as the router sees it) needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


class KeyCheck:
    """Checks keys with vLLM's own comparison.

    Args:
        args: The server's arguments; `api_key` is a list of keys, or None for that of the environment.
    """

    def __init__(self, args: Namespace) -> None:
        # Read here and not where a cluster's application is built, so that the key is in no
        # configuration that Ray stores and shows.
        keys = [key for key in (getattr(args, "api_key", None) or [os.environ.get(VARIABLE)]) if key]
        self._verify = None
        if keys:
            from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

            self._verify = AuthenticationMiddleware(None, keys).verify_token

    def check(self, path: str, headers: Headers) -> None:
        """Check the key of a request.

        Raises:
            RequestError: 401: a key is required, and none or a wrong one was sent.
        """
        if self._verify is None or is_open(path) or self._verify(headers):
            return
        raise RequestError(
            401,
            "This server asks for a key: send it as `Authorization: Bearer KEY`.",
            headers={"WWW-Authenticate": "Bearer"},
        )


def key_header() -> dict[str, str]:
    """Return the authorization header with this environment's key; empty if there is none."""
    key = os.environ.get(VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}
