"""What a live server sends, taken in by tests."""

import json

from websockets.exceptions import ConnectionClosed


async def rest(socket):
    """Return the messages that still come, and the close code."""
    messages = []
    try:
        while True:
            messages.append(json.loads(await socket.recv()))
    except ConnectionClosed:
        return messages, socket.close_code


async def take(client, kind):
    """Return the next event of a kind."""
    async for event in client.events():
        if event.type == kind:
            return event
    raise AssertionError(f"no {kind}")
