"""Patch of vLLM's `AsyncLLM.shutdown`, versions 0.29.0 to 0.32.0: live sessions are told before their engine goes.

At SIGTERM vLLM shuts its engine down first, in a thread, and the connections afterwards; it has no hook before. So
the one client of the server gets a `shutdown` that waits for the sessions' good-bye and then calls the original.
"""

from __future__ import annotations

import asyncio
import inspect
from concurrent.futures import wait

from vllm.engine.protocol import EngineClient

from casa_engine.errors import ConfigError
from casa_serving.live.registry import Registry

SHUTDOWN_TIMEOUT_S = 3.0
PARAMETERS = ["timeout"]


def tell_before_shutdown(engine_client: EngineClient, registry: Registry) -> None:
    """Has the sessions told that the server ends before their engine is taken from under them.

    Mutates:
        engine_client: its `shutdown`.

    Raises:
        ConfigError: vLLM's `shutdown` takes other arguments than in the versions this was written for.
    """
    loop = asyncio.get_running_loop()
    shutdown = engine_client.shutdown
    found = list(inspect.signature(shutdown).parameters)
    if found != PARAMETERS:
        raise ConfigError(f"vLLM's AsyncLLM.shutdown takes {found}; expected {PARAMETERS}: adapt {__name__}.")

    def tell_and_shutdown(timeout: float | None = None) -> None:
        if loop.is_running() and not is_in(loop):
            told = asyncio.run_coroutine_threadsafe(registry.close(SHUTDOWN_TIMEOUT_S), loop)
            # A loop that has stopped in between never answers.
            wait([told], timeout=SHUTDOWN_TIMEOUT_S + 1)
        shutdown(timeout=timeout)

    engine_client.shutdown = tell_and_shutdown


def is_in(loop: asyncio.AbstractEventLoop) -> bool:
    """Tells whether the calling thread is the one that runs the loop, which therefore must not wait for it."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
