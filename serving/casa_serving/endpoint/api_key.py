"""Who may ask what: the key of `--api-key` or VLLM_API_KEY, on every path that is not open to all.

vLLM's own middleware guards the paths under /v1 and leaves the others open, on some of which the
model can be asked just as well (`/invocations`, `/generative_scoring`).
"""

from __future__ import annotations

import os
from argparse import Namespace

from starlette.datastructures import Headers

from casa_serving.errors import RequestError

VARIABLE = "VLLM_API_KEY"
# Whether the server lives, what it counts, and the page, in which the key is typed. None of them shows a request.
OPEN_PATHS = frozenset({"/", "/health", "/ping", "/metrics"})
OPEN_FOLDERS = ("/web/",)


def is_open(path: str) -> bool:
    """Tells whether a path (as the router sees it) is answered without a key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


class KeyCheck:
    """Checks keys as vLLM does.

    Args:
        args: The server's; `api_key` is a list of keys, or None for what the environment says.
    """

    def __init__(self, args: Namespace) -> None:
        # Read here and not where a cluster's application is built, so that the key stands in no
        # configuration that Ray stores and shows.
        keys = [key for key in (getattr(args, "api_key", None) or [os.environ.get(VARIABLE)]) if key]
        self._verify = None
        if keys:
            from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

            self._verify = AuthenticationMiddleware(None, keys).verify_token

    def check(self, path: str, headers: Headers) -> None:
        """Checks the key of a request.

        Raises:
            RequestError: 401: a key is asked for, and was not given.
        """
        if self._verify is None or is_open(path) or self._verify(headers):
            return
        raise RequestError(
            401,
            "This server asks for a key: send it as `Authorization: Bearer KEY`.",
            headers={"WWW-Authenticate": "Bearer"},
        )


def key_header() -> dict[str, str]:
    """Returns the header that opens the server from this environment; empty where no key is asked for."""
    key = os.environ.get(VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}
