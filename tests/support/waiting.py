"""Waiting for what other processes or tasks do in their own time."""

import asyncio
import time


def until(condition, timeout_s=60.0):
    """Wait until a condition holds; fail if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s} s"
        time.sleep(0.5)


async def soon(condition, timeout_s=10.0):
    """Wait in an event loop until a condition holds; fail if it does not in time."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
