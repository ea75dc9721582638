"""No messages of triton's bindings at the end of a CASA engine's processes.

nanobind, with which triton is bound, checks for leaks when the interpreter is gone, and reports hundreds of triton's
own types and functions in each process that has imported it: "nanobind: leaked 64 types!". Its switch is for C++ alone.
They are no leaks of ours, nothing follows from them, and they are what an operator reads last.

    exit handlers (atexit) -> modules are taken down -> the error output is closed -> libraries unload: nanobind

What exit handlers and uncaught errors print is shown, whoever registered them, and whenever. Processes of other models
are left alone.
"""

import atexit
import functools
import os
import sys

_closing: "_ErrorOutput | None" = None


@functools.cache
def close_error_output_at_exit() -> None:
    """Register it; called in each process that configures, schedules or runs a CASA model."""
    atexit.register(_close_with_modules)


def _close_with_modules() -> None:
    """Leave an object behind that goes with this module, which is later than every exit handler."""
    global _closing
    # Without an error output the descriptor may be another file's; and without triton there is nothing to hide.
    if sys.stderr is not None and "triton" in sys.modules:
        _closing = _ErrorOutput()


class _ErrorOutput:
    """Closes the error output when it is deleted. The exit status stays as it is."""

    def __init__(self) -> None:
        self.null, self.dup2 = os.open(os.devnull, os.O_WRONLY), os.dup2  # modules' names are gone by then

    def __del__(self) -> None:
        """Let what is written to the error output's descriptor go nowhere."""
        self.dup2(self.null, 2)
