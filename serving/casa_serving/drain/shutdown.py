"""The end of a server process, from the signal to the exit.

    signal --------- finish --------- end ---- close ---- engine ---- exit
            new requests get 503      |                               at most `--shutdown-timeout` after the signal
            live sessions say good-bye, the rest gets its last words

vLLM's own order is the other way round: it ends the engine first and then waits, without a bound, for clients whose
answers can no longer come. So the signals are taken over here once the server runs, with asyncio's own call, and
vLLM is left by uvicorn's official way, `should_exit`, when nobody waits for anything any more. An engine that has died
ends the server in the same way, without the waiting.
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
from casa_serving.drain.processes import ENDING_SIGNALS, MIN_BOUND_S, Deadline, kill, leave_at_once

logger = logging.getLogger("vllm.casa_drain")
ENGINE_DIED = "The engine has died, and the server ends with it. Send the request again, to another server."
# What the steps after the waiting may take, out of the bound: clients, sockets, the engine.
LEAVING_S = 3.0
Goodbye = Callable[[float], Awaitable[None]]


class ServerShutdown:
    """The end of one server process; made when it is ready to serve, in its event loop.

    Args:
        state: The application's: vLLM's `engine_client`, `server` and `args`, and the `goodbyes` of those who keep
            connections of their own.

    Attributes:
        requests: The open ones.
        reason: Why no more are taken, in words; None as long as they are.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._watch = EngineWatch(state.engine_client, self._engine_died)
        self.requests = OpenRequests(self._fault)
        self.reason: str | None = None
        # Once everybody was told; what still holds the connection then reads nothing.
        state.server.config.timeout_graceful_shutdown = FINAL_MESSAGE_S
        state.args.engine_processes = self._watch.processes
        for number in ENDING_SIGNALS:
            self._loop.add_signal_handler(number, self._signalled, number)

    def close(self) -> None:
        """Stops watching the engine. The signals stay taken: the process is about to end."""
        self._watch.close()

    def _signalled(self, number: int) -> None:
        if self.reason is None:
            logger.info("Shutdown: %s, %s requests open.", signal.Signals(number).name, len(self.requests))
            self._state.args.was_asked_to_end = True
            self._begin(SHUTTING_DOWN, self._state.engine_client.vllm_config.shutdown_timeout)
        # An API server beside others gets what its parent sends on besides what a terminal sends to all processes.
        elif multiprocessing.parent_process() is None:
            leave_at_once(128 + number, self._watch.processes)

    def _fault(self) -> str | None:
        # An engine that ends because it was told to has not died.
        return (self.reason or ENGINE_DIED) if self._watch.has_died else None

    def _engine_died(self) -> None:
        # Workers are slow to notice.
        kill(self._watch.processes)
        if self.reason is None:
            logger.error("Shutdown: the engine has died, %s requests open.", len(self.requests))
            self._begin(ENGINE_DIED, 0)
        else:
            # It heard the same Ctrl-C, or died meanwhile: whoever still waits for it waits in vain.
            self.requests.end(self.reason)

    def _begin(self, reason: str, timeout_s: float) -> None:
        self.reason = reason
        bound_s = max(timeout_s, MIN_BOUND_S)
        finish_s = min(timeout_s, max(0.0, bound_s - LEAVING_S))
        Deadline(bound_s, 0 if reason is SHUTTING_DOWN else 1, self._watch.processes).start()
        self._task = asyncio.create_task(self._leave(reason, finish_s, bound_s))

    async def _leave(self, reason: str, finish_s: float, bound_s: float) -> None:
        begun_s = time.monotonic()
        server, engine_client = self._state.server, self._state.engine_client
        # vLLM's handler of a dead engine would close the sockets before their clients are told.
        server.should_exit = False
        goodbyes = [
            asyncio.ensure_future(goodbye(finish_s + FINAL_MESSAGE_S))
            for goodbye in getattr(self._state, "goodbyes", ())
        ]
        if not await self.requests.wait(finish_s):
            logger.warning("Shutdown: %s requests are ended before they were done.", len(self.requests))
        self.requests.end(reason)
        await self.requests.wait(2 * FINAL_MESSAGE_S)
        if goodbyes:
            await asyncio.wait(goodbyes, timeout=max(2 * FINAL_MESSAGE_S, begun_s + finish_s - time.monotonic()))
        # What vLLM gives the engine's process. Nothing is under way in it any more, but its workers would take seconds.
        engine_client.vllm_config.shutdown_timeout = FINAL_MESSAGE_S
        server.should_exit = True
