"""Forced exit of processes: at a second signal, and when the shutdown timeout is reached."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, NoReturn, Self

if TYPE_CHECKING:
    import psutil

logger = logging.getLogger("vllm.casa_drain")
# Lower limit of the shutdown timeout: what notifying all clients takes at worst.
MIN_BOUND_S = 3.0
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Python's own helper, which removes the shared memory of killed processes and exits after them.
RESOURCE_TRACKER = "multiprocessing.resource_tracker"
# Compilers that torch.compile runs on a CPU. Killed halfway, one leaves a truncated library in torch's cache, which
# crashes the engine of every later server that loads it; otherwise it completes in seconds.
COMPILER = re.compile(r"(.*-)?(c\+\+|g\+\+|clang|clang\+\+|cc1plus|as|collect2|ld)([-.][\w.]+)?")


def descendants(process: psutil.Process | None = None) -> list[psutil.Process]:
    """Return all descendants of a process, by default of this one."""
    import psutil  # Comes with vLLM; casa-serve reports its absence with an error message.

    return (process or psutil.Process()).children(recursive=True)


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill processes that still run, except compilers and the resource tracker, which exit by themselves."""
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.Error):
            if not COMPILER.fullmatch(process.name()) and RESOURCE_TRACKER not in " ".join(process.cmdline()):
                process.kill()


def exit_immediately(status: int, others: Iterable[psutil.Process] = ()) -> NoReturn:
    """Exit immediately, without cleanup, and kill all descendants.

    Args:
        status: Exit status.
        others: Further processes to kill: those whose parent may have exited already.
    """
    try:
        kill(others)
        kill(descendants())
    finally:
        os._exit(status)


class Deadline(threading.Thread):
    """Thread that exits the process after a time, whatever blocks it: a thread that decodes an image, a stuck engine.

    Args:
        bound_s: Seconds from the start of the thread.
        status: Exit status.
        others: See `exit_immediately`.
    """

    def __init__(self, bound_s: float, status: int, others: Iterable[psutil.Process] = ()) -> None:
        super().__init__(name="casa-deadline", daemon=True)
        self._bound_s, self._status, self._others = bound_s, status, others

    def run(self) -> None:
        """Sleeps, then exits the process; the thread is a daemon, which ends with a process that exits before."""
        time.sleep(self._bound_s)
        logger.warning("Shutdown: the bound is reached; what still runs is ended with the process.")
        exit_immediately(self._status, self._others)


class SignalCounter(threading.Thread):
    """Thread that exits the process at the second SIGINT or SIGTERM; for a process without an event loop.

    The parent of several API servers handles only the first one, in vLLM's own handler; with Ray the main thread may
    be blocked anywhere. Python writes the number of every signal to the wake-up socket, whatever its handler is.

    Attributes:
        started: The descendants at the first signal.
    """

    def __init__(self) -> None:
        super().__init__(name="casa-signals", daemon=True)
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self.started: list[psutil.Process] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop counting: a process forked later would share the socket, and its signals would be counted here."""
        signal.set_wakeup_fd(-1)
        self._writer.close()

    def run(self) -> None:
        """Read signal numbers until the second SIGINT or SIGTERM."""
        num_signals = 0
        while numbers := self._reader.recv(64):
            for number in filter(ENDING_SIGNALS.__contains__, numbers):
                num_signals += 1
                if num_signals == 2:
                    exit_immediately(128 + number, self.started)
                self.started = descendants()
