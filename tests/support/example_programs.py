"""Runs the programs of `examples/` as a newcomer does."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run_example(name: str, *arguments: str | Path, folder: Path) -> list[str]:
    """Runs a program in a folder; returns the lines that it prints.

    Args:
        name: The program's file name.
        *arguments: Its command line.
        folder: Where it is started.
    """
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()
