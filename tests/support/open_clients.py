"""Clients that are there when a server ends, and what they get."""

import asyncio
import struct

import httpx
from websockets.asyncio.client import connect

from image_files import encoded, plain
from live_messages import rest

MODEL = "casa-tiny-digits"
# More than is said before anybody ends it.
ENDLESS = {"max_tokens": 3900, "ignore_eos": True}


def chat(*parts, **options):
    """Return the body of a chat."""
    content = [{"type": "text", "text": "Say."}, *parts]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **ENDLESS, **options}


# This API knows no `ignore_eos`: a text that is not done before it has so many characters.
LONG_TEXT = {"type": "json_schema", "schema": {"type": "string", "minLength": 3000}}
STREAMS = {
    "/v1/chat/completions": chat(stream=True),
    "/v1/completions": {"model": MODEL, "prompt": "a", "stream": True, **ENDLESS},
    "/v1/responses": {"model": MODEL, "input": "a", "stream": True, "max_output_tokens": 3900, "ignore_eos": True},
    "/v1/messages": {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Say."}],
        "stream": True,
        "max_tokens": 3900,
        "output_config": {"format": LONG_TEXT},
    },
}


def stream(url, path, begun):
    """Read a stream to its end; return the last events."""
    with httpx.stream("POST", url + path, json=STREAMS[path], timeout=120) as answer:
        assert answer.status_code == 200
        lines = []
        for line in answer.iter_lines():
            begun.set()
            lines.append(line)
    return [line for line in lines if line][-2:]


def post(url, body):
    """Return the answer to a chat that is no stream."""
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)


def watch(url, begun):
    """Hold a live session until the server ends it; return the last message and the close code."""

    async def hold():
        async with connect(url) as client:
            await client.send('{"type": "session.create"}')
            await client.recv()
            await client.send(struct.pack("<d", 0.0) + encoded(plain()))
            begun.set()
            messages, code = await rest(client)
            return messages[-1], code

    return asyncio.run(hold())
