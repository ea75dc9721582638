"""Runs the programs of `examples/` as a newcomer does."""

import sys
from pathlib import Path

from programs import output_of

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run_example(name: str, *arguments: str | Path, folder: Path) -> list[str]:
    """Run a program in a folder; return the lines that it prints.

    Args:
        name: The program's file name.
        *arguments: Its command line.
        folder: Where it is started.
    """
    return output_of(sys.executable, EXAMPLES / name, *arguments, folder=folder, NO_PROXY="*").splitlines()
