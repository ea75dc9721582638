"""Work that gets a signal at a chosen step: the way to show that a folder survives whatever ends its writer."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

FILE_EVENTS = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "open"}
LIMIT_S = 300  # on a machine that others use too


def ended_at(step: int, root: Path, work: Callable[[], object], number: int = signal.SIGKILL) -> bool:
    """Run `work` in a process that gets a signal at its `step`-th access to files in `root`; False: it ended first."""
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S)
        left = [step]

        def count(event: str, arguments: tuple) -> None:
            if event in FILE_EVENTS and any(_is_within(argument, root) for argument in arguments):
                left[0] -= 1
                if left[0] == -1:
                    os.kill(os.getpid(), number)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0 if left[0] >= 0 else 1)
    status = os.waitpid(child, 0)[1]
    assert not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM), f"step {step} takes for ever"
    return status != 0


def _is_within(argument: object, root: Path) -> bool:
    return isinstance(argument, (str, bytes, os.PathLike)) and os.fsdecode(argument).startswith(str(root))
