"""Middleware for a server under test (`--middleware server_probe.Probe`): tells what it holds, at `GET /probe`."""

import asyncio
import gc
import json

import psutil

from casa_serving.live.connection import Connection


class Probe:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope.get("path") != "/probe":
            await self.app(scope, receive, send)
            return
        gc.collect()
        held = {
            "tasks": len(asyncio.all_tasks()),
            "connections": sum(isinstance(thing, Connection) for thing in gc.get_objects()),
            "rss": psutil.Process().memory_info().rss,
        }
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(held).encode()})
