"""Tests of asynchronous code without a plugin for it."""

import asyncio
import functools


def in_loop(test):
    """Runs an async test to its end, at most three minutes."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 180))

    return run
