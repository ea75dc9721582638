"""Clients that send half a body and then nothing, over real connections."""

import asyncio
import json
import re
import time
from urllib.parse import urlsplit

import httpx
import pytest

pytestmark = pytest.mark.vllm
# Seven halves of 5.6 MB are below the limit on all bodies; half of one of 3 MB more is above it.
BODIES = [11_200_000] * 7 + [3_000_000]
# What is taken off the wire before a connection is closed, and what a busy machine adds.
SLACK_S = 20


def option_of(server, name):
    """Return what a server was started with."""
    arguments = [str(argument) for argument in server.process.args]
    return float(arguments[arguments.index(name) + 1])


async def send_half(url, size):
    """Send head and half of a body, then nothing; return the answer's status, message and seconds until the end."""
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {size}"
    started = time.monotonic()
    writer.write(head.encode() + b'\r\n\r\n{"model": "' + b"x" * (size // 2))
    answer = await reader.read()  # Until the server closes.
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"], time.monotonic() - started


async def test_bodies_that_are_half_sent(server, good_request):
    expected = good_request()
    read_timeout_s = option_of(server, "--request-read-timeout")
    max_bytes = option_of(server, "--max-request-bytes-in-flight")
    assert sum(BODIES[:-1]) < 2 * max_bytes < sum(BODIES)
    clients = [asyncio.create_task(send_half(urlsplit(server.url), size)) for size in BODIES]
    num_healthy = 0
    async with httpx.AsyncClient(trust_env=False) as watcher:
        while not all(client.done() for client in clients):
            assert (await watcher.get(f"{server.url}/health", timeout=30)).status_code == 200
            num_healthy += 1
            await asyncio.sleep(0.2)
    answers = [client.result() for client in clients]
    # How many are refused depends on whose bytes come last.
    assert {status for status, _, _ in answers} == {408, 429}
    num_bytes = 0
    for status, message, held_s in answers:
        if status == 408:
            assert "--request-read-timeout" in message
            assert read_timeout_s * 0.9 < held_s < read_timeout_s + SLACK_S
            num_bytes += int(re.search(r"got (\d+) bytes", message)[1])
        else:
            assert "--max-request-bytes-in-flight" in message
    assert 0 < num_bytes <= max_bytes
    assert num_healthy > 5
    # All of it was given back.
    assert good_request() == expected
