"""Runs a test file in a process in which Triton's kernels are interpreted: that is decided when triton is imported."""

import os
import subprocess
import sys

import pytest


def check_under_interpreter(file: str) -> None:
    """Run a file's tests, of which some must pass and none fail; skip where there is no Triton."""
    pytest.importorskip("triton", reason="Triton has no build for this machine")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout
