"""The functions behind the console scripts; each imports its command only when it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable

from casa_commands.missing import run

Main = Callable[[], int | None]


def serve() -> int:
    """Run `casa-serve`."""

    def load() -> Main:
        from casa_serving.cli import main

        return main

    extras = ("cpu", "ray") if sys.argv[1:2] == ["--ray"] else ("cpu",)
    return run("casa-serve", load, *extras)


def caption() -> int:
    """Run `casa-caption`."""

    def load() -> Main:
        from casa_serving.caption.cli import main

        return main

    return run("casa-caption", load, "live", "cpu")


def export() -> int:
    """Run `casa-export`."""

    def load() -> Main:
        from casa_export.cli import main

        return main

    return run("casa-export", load, "export", "trt")


def checkpoint() -> int:
    """Run `casa-checkpoint`."""

    def load() -> Main:
        from casa_engine.checkpoint_cli import main

        return main

    return run("casa-checkpoint", load)


def train_digits() -> int:
    """Run `casa-train-digits`."""

    def load() -> Main:
        from casa_digits.train import main

        return main

    return run("casa-train-digits", load, "digits")


def eval_digits() -> int:
    """Run `casa-eval-digits`."""

    def load() -> Main:
        from casa_digits.evaluate import main

        return main

    return run("casa-eval-digits", load, "digits", "serving")


def digits_video() -> int:
    """Run `casa-digits-video`."""

    def load() -> Main:
        from casa_digits.video import main

        return main

    return run("casa-digits-video", load, "digits")
