"""Tells at once that the engine has died, in a server that started it and in one of several beside it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable

import psutil
from vllm import envs
from vllm.engine.protocol import EngineClient

from casa_serving.drain.processes import descendants

INTERVAL_S = 0.05
TITLE = "EngineCore"


class EngineWatch:
    """Looks after an engine until it has died or `close` is called; to be made in the event loop.

    vLLM itself looks every five seconds, and several API servers learn it only from their parent's signal.

    Args:
        engine_client: vLLM's.
        died: Called once, in the event loop.

    Attributes:
        processes: The engine's on this machine, and its workers', which may outlive it.
    """

    def __init__(self, engine_client: EngineClient, died: Callable[[], None]) -> None:
        self._engine_client, self._died = engine_client, died
        self._engines = engine_processes()
        self.processes = [process for engine in self._engines for process in (engine, *descendants(engine))]
        self._task = asyncio.create_task(self._run())

    @property
    def has_died(self) -> bool:
        """Whether nothing will come from the engine any more."""
        return self._engine_client.errored or not all(map(is_alive, self._engines))

    def close(self) -> None:
        """Stops looking."""
        self._task.cancel()

    async def _run(self) -> None:
        # Whoever sets this wants the server to stay.
        while not envs.VLLM_KEEP_ALIVE_ON_ENGINE_DEATH:
            await asyncio.sleep(INTERVAL_S)
            if self.has_died:
                self._died()
                return


def engine_processes() -> list[psutil.Process]:
    """Returns the engine's processes: children of this one, or of its parent where that has several API servers."""
    is_alone = multiprocessing.parent_process() is None
    starter = psutil.Process() if is_alone else psutil.Process(os.getppid())
    return [process for process in starter.children() if TITLE in " ".join(process.cmdline())]


def is_alive(process: psutil.Process) -> bool:
    """Tells whether a process runs; one that has died and was not yet taken note of does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
