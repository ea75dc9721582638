"""The functions behind `casa COMMAND` and the console scripts; each imports its command only when it runs.

Each takes its command line (default: this process's) and its name in messages, and returns the exit status.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module

from casa_commands.missing import run

Arguments = list[str] | None


def serve(arguments: Arguments = None, program: str = "casa-serve") -> int:
    """Run `casa serve`."""
    given = sys.argv[1:] if arguments is None else arguments
    extras = ("cpu", "ray") if given[:1] == ["--ray"] else ("cpu",)
    return _run("casa_serving.cli", arguments, program, *extras)


def caption(arguments: Arguments = None, program: str = "casa-caption") -> int:
    """Run `casa caption`."""
    return _run("casa_serving.caption.cli", arguments, program, "live", "cpu")


def export(arguments: Arguments = None, program: str = "casa-export") -> int:
    """Run `casa export`."""
    return _run("casa_export.cli", arguments, program, "export", "trt")


def checkpoint(arguments: Arguments = None, program: str = "casa-checkpoint") -> int:
    """Run `casa checkpoint`."""
    return _run("casa_engine.checkpoint_cli", arguments, program)


def train_digits(arguments: Arguments = None, program: str = "casa-train-digits") -> int:
    """Run `casa digits train`."""
    return _run("casa_digits.train", arguments, program, "digits")


def eval_digits(arguments: Arguments = None, program: str = "casa-eval-digits") -> int:
    """Run `casa digits eval`."""
    return _run("casa_digits.evaluate", arguments, program, "digits", "serving")


def digits_video(arguments: Arguments = None, program: str = "casa-digits-video") -> int:
    """Run `casa digits video`."""
    return _run("casa_digits.video", arguments, program, "digits")


def _run(module: str, arguments: Arguments, program: str, *extras: str) -> int:
    """Run a module's `main` as `missing.run` does; `arguments` None means this process's command line."""
    given = sys.argv[1:] if arguments is None else arguments
    return run(program, lambda: partial(import_module(module).main, given, program), *extras)
