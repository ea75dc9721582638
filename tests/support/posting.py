"""Posts JSON to a server of a test, without a client that would hide an error."""

import http.client
import json
from urllib.parse import urlsplit

from serving_process import Server


def post(server: Server, path: str, body: object, **headers: str) -> tuple[int, str]:
    """Return status and body of an answer."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text
