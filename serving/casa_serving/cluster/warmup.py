"""The first requests to an application, before it is reported as ready."""

from __future__ import annotations

import httpx

from casa_engine.errors import InputError
from casa_serving.endpoint.api_key import VARIABLE, key_header

TIMEOUT_S = 120.0


def warm_up(url: str) -> None:
    """Send one request through proxy, ingress and a replica.

    Args:
        url: The server's address without a path.

    Raises:
        httpx.HTTPError: It does not return a completion.
        InputError: A key is set here, and the server does not require it; or it is another server.
    """
    # Without the environment's proxies: the server is on this machine, or in this cluster.
    with httpx.Client(base_url=url, headers=key_header(), timeout=TIMEOUT_S, trust_env=False) as client:
        check_key(client)
        models = client.get("/v1/models").raise_for_status()
        try:
            model = models.json()["data"][0]["id"]
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"The server at {url} is not casa-engine: /v1/models lists no model.") from error
        message = {"role": "user", "content": "ok"}
        request = {"model": model, "messages": [message], "max_tokens": 1}
        client.post("/v1/chat/completions", json=request).raise_for_status()


def check_key(client: httpx.Client) -> None:
    """Reject a server that requires no key although one is set here: each node has its own environment."""
    if not key_header():
        return
    request = client.build_request("GET", "/v1/models")
    del request.headers["Authorization"]
    response = client.send(request)
    if response.status_code == 401:
        return
    response.raise_for_status()
    raise InputError(
        f"{VARIABLE} is set here, but not where the ingress runs, which serves requests without a key. Set it in the "
        "environment of `ray start` on every node."
    )
