"""How a command ends: an error that the user can fix is one message and exit status 1, never a traceback."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from types import FrameType

from casa_engine.errors import CasaError


def run_command(program: str, work: Callable[[], int | None]) -> int:
    """Run a command to its end.

    Args:
        program: Its name, which begins the message.
        work: What it does; returns an exit status, nothing for 0. Ctrl-C and SIGTERM end it with its clean-up done.

    Returns:
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names of files and words of a model may not fit the terminal
            stream.reconfigure(errors="backslashreplace")
    try:
        with sigterm_as_interrupt():
            return work() or 0
    except CasaError as error:
        return _fail(program, str(error))
    except OSError as error:
        return _fail(program, f"{error}.")
    except UnicodeEncodeError as error:
        return _fail(program, f"{error.object!r} is not valid UTF-8. Use another name.")
    except KeyboardInterrupt:
        return _fail(program, "interrupted.")


def _fail(program: str, message: str) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return 1


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Make SIGTERM end the command as Ctrl-C does within the block: unfinished files are removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = None
    with suppress(ValueError):  # not in the main thread: the program that it belongs to handles signals
        previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
