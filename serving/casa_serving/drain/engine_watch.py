"""Detection of the engine's death, in a server that started the engine and in one of several API servers."""

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
    """Polls an engine until it has died or `close` is called; to be created in the event loop.

    vLLM itself polls every five seconds, and several API servers learn of it only from their parent's signal.

    Args:
        engine_client: vLLM's.
        on_death: Called once, in the event loop.

    Attributes:
        processes: The engine's processes on this machine, and those of its workers, which may outlive it.
    """

    def __init__(self, engine_client: EngineClient, on_death: Callable[[], None]) -> None:
        self._engine_client, self._on_death = engine_client, on_death
        self._engines = engine_processes()
        self.processes = [process for engine in self._engines for process in (engine, *descendants(engine))]
        self._task = asyncio.create_task(self._run())

    @property
    def has_died(self) -> bool:
        """Whether the engine can produce no more output."""
        return self._engine_client.errored or not all(map(is_alive, self._engines))

    def close(self) -> None:
        """Stop polling."""
        self._task.cancel()

    async def _run(self) -> None:
        # vLLM's option to keep the server running without its engine.
        while not envs.VLLM_KEEP_ALIVE_ON_ENGINE_DEATH:
            await asyncio.sleep(INTERVAL_S)
            if self.has_died:
                self._on_death()
                return


def engine_processes() -> list[psutil.Process]:
    """Return the engine's processes: children of this process, or of its parent if there are several API servers."""
    is_alone = multiprocessing.parent_process() is None
    starter = psutil.Process() if is_alone else psutil.Process(os.getppid())
    return [process for process in starter.children() if TITLE in " ".join(process.cmdline())]


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process is running; a zombie, not yet reaped, is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
