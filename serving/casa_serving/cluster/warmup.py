"""The first requests to an application, before it is reported as ready."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

from casa_engine.errors import InputError
from casa_serving.endpoint.api_key import VARIABLE, key_header

TIMEOUT_S = 120.0


def first_request(url: str) -> None:
    """Sends one request through proxy, ingress and a replica, which warms them up.

    Args:
        url: The server's address without a path.

    Raises:
        OSError: It does not return a completion.
        InputError: A key is set here, and the server does not require it; or it is another server.
    """
    check_key(url)
    with send(f"{url}/v1/models", key_header()) as answer:
        try:
            model = json.load(answer)["data"][0]["id"]
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"Something else than casa-engine answers at {url}/v1/models.") from error
    message = {"role": "user", "content": "ok"}
    body = json.dumps({"model": model, "messages": [message], "max_tokens": 1}).encode()
    with send(f"{url}/v1/chat/completions", {"Content-Type": "application/json", **key_header()}, body):
        pass


def check_key(url: str) -> None:
    """Rejects a server that requires no key although one is set here: each node has its own environment."""
    if not key_header():
        return
    try:
        with send(f"{url}/v1/models", {}):
            pass
    except urllib.error.HTTPError as error:
        if error.code == 401:
            return
        raise
    raise InputError(
        f"{VARIABLE} is set here, but not where the ingress runs: everybody could ask. Set it in the environment of "
        "`ray start` on every node."
    )


def send(url: str, headers: dict[str, str], body: bytes | None = None) -> urllib.request.addinfourl:
    """Sends a request without the environment's proxies."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(urllib.request.Request(url, data=body, headers=headers), timeout=TIMEOUT_S)
