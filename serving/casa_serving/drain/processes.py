"""Ends processes that do not end by themselves: at a second signal, and when the bound is reached."""

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
# No bound is shorter than this: it is what telling everybody takes at worst.
MIN_BOUND_S = 3.0
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Python's own helper, which removes the shared memory of processes that were killed, and ends after them.
RESOURCE_TRACKER = "multiprocessing.resource_tracker"
# What torch.compile runs on a CPU. Ended halfway, one leaves half a library in torch's cache, which ends the engine of
# every later server that loads it; left alone it is done in seconds.
COMPILER = re.compile(r"(.*-)?(c\+\+|g\+\+|clang|clang\+\+|cc1plus|as|collect2|ld)([-.][\w.]+)?")


def descendants(process: psutil.Process | None = None) -> list[psutil.Process]:
    """Returns the processes that one has started, this one by default, and those that they have started."""
    import psutil  # Comes with vLLM, whose absence casa-serve says in a sentence.

    return (process or psutil.Process()).children(recursive=True)


def kill(processes: Iterable[psutil.Process]) -> None:
    """Ends processes now, where they still run, but for those that must finish and then end by themselves."""
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.Error):
            if not COMPILER.fullmatch(process.name()) and RESOURCE_TRACKER not in " ".join(process.cmdline()):
                process.kill()


def leave_at_once(status: int, others: Iterable[psutil.Process] = ()) -> NoReturn:
    """Ends this process and all that it has started, now.

    Args:
        status: Of the exit.
        others: Started by one of them that may have gone before.
    """
    try:
        kill(others)
        kill(descendants())
    finally:
        os._exit(status)


class Deadline(threading.Thread):
    """Ends the process when the bound is reached, whatever holds it up: a thread at work on an image, a stuck engine.

    Args:
        bound_s: Seconds from its start.
        status: Of the exit.
        others: See `leave_at_once`.
    """

    def __init__(self, bound_s: float, status: int, others: Iterable[psutil.Process] = ()) -> None:
        super().__init__(name="casa-deadline", daemon=True)
        self._bound_s, self._status, self._others = bound_s, status, others

    def run(self) -> None:
        """Waits, then ends the process; a process that ends before takes this thread along."""
        time.sleep(self._bound_s)
        logger.warning("Shutdown: the bound is reached; what still runs is ended with the process.")
        leave_at_once(self._status, self._others)


class SignalCounter(threading.Thread):
    """Has the second SIGINT or SIGTERM end this process at once; for one that runs no event loop.

    The parent of several API servers looks at the first one only, in vLLM's own handler; with Ray the main thread may
    be anywhere in it. Python writes every signal's
    number to the wake-up socket, whatever its handler is.

    Attributes:
        started: The processes that were there at the first signal.
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
        """Stops counting: a process forked later shares the socket, and its signals would count here."""
        signal.set_wakeup_fd(-1)
        self._writer.close()

    def run(self) -> None:
        """Reads the numbers of signals until there were two that end the process."""
        num_signals = 0
        while numbers := self._reader.recv(64):
            for number in filter(ENDING_SIGNALS.__contains__, numbers):
                num_signals += 1
                if num_signals == 2:
                    leave_at_once(128 + number, self.started)
                self.started = descendants()
