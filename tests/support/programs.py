"""Runs a program to its end, in a folder of its own."""

import os
import subprocess
from pathlib import Path


def output_of(*command: str | Path, folder: Path, timeout_s: float = 400, **environment: str) -> str:
    """Run a command, which must succeed; return what it prints.

    Args:
        *command: Its command line.
        folder: Where it is started.
        timeout_s: Most seconds that it may take.
        **environment: Variables beside those of this process and one thread for each library.
    """
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
