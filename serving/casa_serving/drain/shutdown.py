"""Graceful shutdown of a server process, from the signal to the exit.

    signal --------- finish --------- end ---- close ---- engine ---- exit
            new requests get 503      |                               at most `--shutdown-timeout` after the signal
            live sessions are closed, open requests get an error

vLLM's own order is the reverse: it shuts the engine down first and then waits, without a timeout, for clients whose
responses can no longer come. So asyncio's signal handlers replace vLLM's once the server runs, and vLLM's server is
stopped by uvicorn's own flag, `should_exit`, when no request is open any more. An engine that has died ends the server
in the same way, without the time to finish.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import time
from collections.abc import Awaitable, Callable

from starlette.datastructures import State

from casa_serving.drain.engine_watch import EngineWatch
from casa_serving.drain.final_messages import SHUTTING_DOWN
from casa_serving.drain.open_requests import FINAL_MESSAGE_S, OpenRequests
from casa_serving.drain.processes import ENDING_SIGNALS, MIN_BOUND_S, Deadline, exit_immediately, kill

logger = logging.getLogger("vllm.casa_drain")
ENGINE_DIED = "The engine has died, and the server ends with it. Send the request again, to another server."
# Part of the timeout that is reserved for the steps after `finish`: final messages, sockets, the engine.
CLEANUP_S = 3.0
ShutdownHook = Callable[[float], Awaitable[None]]


class ServerShutdown:
    """Shutdown of one server process; created in its event loop when the server is ready.

    Args:
        state: The application's: vLLM's `engine_client`, `server` and `args`, and `shutdown_hooks`
            (`list[ShutdownHook]`), which close connections that are no HTTP requests, within the given seconds.

    Attributes:
        requests: The open requests.
        reason: Error message for new requests; None as long as they are accepted.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._watch = EngineWatch(state.engine_client, self._engine_died)
        self.requests = OpenRequests(self._fatal_error)
        self.reason: str | None = None
        # uvicorn's wait for connections that are still open after the final messages: their clients do not read.
        state.server.config.timeout_graceful_shutdown = FINAL_MESSAGE_S
        state.args.engine_processes = self._watch.processes
        for number in ENDING_SIGNALS:
            self._loop.add_signal_handler(number, self._on_signal, number)

    def close(self) -> None:
        """Stop watching the engine. The signal handlers stay: the process is about to exit."""
        self._watch.close()

    def _on_signal(self, number: int) -> None:
        if self.reason is None:
            logger.info("Shutdown: %s, %s requests open.", signal.Signals(number).name, len(self.requests))
            self._state.args.was_asked_to_end = True
            self._begin(SHUTTING_DOWN, self._state.engine_client.vllm_config.shutdown_timeout)
        # One of several API servers gets a terminal's signal twice: directly, and forwarded by its parent.
        elif multiprocessing.parent_process() is None:
            exit_immediately(128 + number, self._watch.processes)

    def _fatal_error(self) -> str | None:
        # An engine that exits during shutdown has not died.
        return (self.reason or ENGINE_DIED) if self._watch.has_died else None

    def _engine_died(self) -> None:
        # Workers are slow to notice.
        kill(self._watch.processes)
        if self.reason is None:
            logger.error("Shutdown: the engine has died, %s requests open.", len(self.requests))
            self._begin(ENGINE_DIED, 0)
        else:
            # It got the same Ctrl-C, or died during shutdown: open requests can no longer complete.
            self.requests.end(self.reason)

    def _begin(self, reason: str, timeout_s: float) -> None:
        self.reason = reason
        bound_s = max(timeout_s, MIN_BOUND_S)
        finish_s = min(timeout_s, max(0.0, bound_s - CLEANUP_S))
        Deadline(bound_s, 0 if reason is SHUTTING_DOWN else 1, self._watch.processes).start()
        self._task = asyncio.create_task(self._shut_down(reason, finish_s, bound_s))

    async def _shut_down(self, reason: str, finish_s: float, bound_s: float) -> None:
        begun_s = time.monotonic()
        server, engine_client = self._state.server, self._state.engine_client
        # vLLM's handler of a dead engine would close the sockets before the final messages are sent.
        server.should_exit = False
        hooks = [
            asyncio.ensure_future(hook(finish_s + FINAL_MESSAGE_S))
            for hook in getattr(self._state, "shutdown_hooks", ())
        ]
        if not await self.requests.wait(finish_s):
            logger.warning("Shutdown: %s requests are ended before they were done.", len(self.requests))
        self.requests.end(reason)
        await self.requests.wait(2 * FINAL_MESSAGE_S)
        if hooks:
            await asyncio.wait(hooks, timeout=max(2 * FINAL_MESSAGE_S, begun_s + finish_s - time.monotonic()))
        # vLLM's timeout for the engine's process, which is idle by now; its workers would take seconds to exit.
        engine_client.vllm_config.shutdown_timeout = FINAL_MESSAGE_S
        server.should_exit = True
