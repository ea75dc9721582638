"""The functions behind `casa COMMAND` and the console scripts; each imports its command only when it runs.

Each takes its command line (default: this process's) and its name in messages, and returns the exit status.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from casa_commands.missing import run

Arguments = list[str] | None
Main = Callable[[list[str], str], int | None]


def serve(arguments: Arguments = None, program: str = "casa-serve") -> int:
    """Run `casa serve`."""

    def load() -> Main:
        from casa_serving.cli import main

        return main

    given = sys.argv[1:] if arguments is None else arguments
    extras = ("cpu", "ray") if given[:1] == ["--ray"] else ("cpu",)
    return _run(load, arguments, program, *extras)


def caption(arguments: Arguments = None, program: str = "casa-caption") -> int:
    """Run `casa caption`."""

    def load() -> Main:
        from casa_serving.caption.cli import main

        return main

    return _run(load, arguments, program, "live", "cpu")


def export(arguments: Arguments = None, program: str = "casa-export") -> int:
    """Run `casa export`."""

    def load() -> Main:
        from casa_export.cli import main

        return main

    return _run(load, arguments, program, "export", "trt")


def checkpoint(arguments: Arguments = None, program: str = "casa-checkpoint") -> int:
    """Run `casa checkpoint`."""

    def load() -> Main:
        from casa_engine.checkpoint_cli import main

        return main

    return _run(load, arguments, program)


def train_digits(arguments: Arguments = None, program: str = "casa-train-digits") -> int:
    """Run `casa digits train`."""

    def load() -> Main:
        from casa_digits.train import main

        return main

    return _run(load, arguments, program, "digits")


def eval_digits(arguments: Arguments = None, program: str = "casa-eval-digits") -> int:
    """Run `casa digits eval`."""

    def load() -> Main:
        from casa_digits.evaluate import main

        return main

    return _run(load, arguments, program, "digits", "serving")


def digits_video(arguments: Arguments = None, program: str = "casa-digits-video") -> int:
    """Run `casa digits video`."""

    def load() -> Main:
        from casa_digits.video import main

        return main

    return _run(load, arguments, program, "digits")


def _run(load: Callable[[], Main], arguments: Arguments, program: str, *extras: str) -> int:
    """Run a command as `missing.run` does; `arguments` None means this process's command line."""
    given = sys.argv[1:] if arguments is None else arguments
    return run(program, lambda: partial(load(), given, program), *extras)
