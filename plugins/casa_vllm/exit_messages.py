"""No messages of triton's bindings at the end of a process.

nanobind, with which triton is bound, checks for leaks when the interpreter is gone, and reports hundreds of triton's
own types and functions in each process that has imported it: "nanobind: leaked 64 types!". Its switch is for C++ alone.
They are no leaks of ours, nothing follows from them, and they are what an operator reads last. So the error output is
closed as the last thing that Python does: what is printed later comes from libraries that are being unloaded.
"""

import atexit
import functools
import os
import sys


@functools.cache
def close_error_output_at_exit() -> None:
    """Registers it; called where plugins are loaded, early, so that it runs behind most other exit handlers."""
    atexit.register(_close_error_output)


def _close_error_output() -> None:
    """Lets what is written to the error output's descriptor go nowhere. The exit status stays as it is."""
    if sys.stderr is not None:
        sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
