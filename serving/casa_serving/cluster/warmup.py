"""The first requests to an application, before it is called ready."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

from casa_engine.errors import InputError
from casa_serving.endpoint.api_key import VARIABLE, key_header

TIMEOUT_S = 120.0


def first_request(url: str) -> None:
    """Sends one request through proxy, ingress and a replica, which set themselves up for the first one.

    Args:
        url: The server's address without a path.

    Raises:
        OSError: It is not answered with a completion.
        InputError: A key is set here, and the server answers without it; or it is another server.
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
    """Refuses a server that is open although a key is set: the nodes of a cluster have environments of their own."""
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
    """Sends a request to this very machine or cluster; no proxy of the environment's stands between."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(urllib.request.Request(url, data=body, headers=headers), timeout=TIMEOUT_S)
