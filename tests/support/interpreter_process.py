"""Runs a test file in a process in which Triton's kernels are interpreted: that is decided when triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Whether this is such a process, and one in which vLLM's Model Runner V2 runs (see interpreted_triton.py).
IS_V2 = "interpreted_triton" in sys.modules
V2 = ("-p", "interpreted_triton")


def check_under_interpreter(file: str, *options: str, timeout_s: float = 300) -> None:
    """Run a file's tests, of which some must pass and none fail; skip where there is no Triton.

    Args:
        file: The file.
        *options: More options of pytest, `V2` or what chooses among the tests.
        timeout_s: For all of them, seconds.
    """
    pytest.importorskip("triton", reason="Triton has no build for this machine")
    variables = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, file]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout
