#!/usr/bin/env python3
"""Writes the lock files anew, with the newest versions that pyproject.toml allows, by uv.

`make lock` runs it; `make test` afterwards installs what was locked and runs the tests.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from installers import run, uv_environment
from requirements import EXTRAS, MEDIA_PACKAGES, ROOT, lock_path

OLDEST_PYTHON = "3.11"
# What packages ask for on this platform alone. One lock serves every platform, and uv reads the requirements of one
# of a package's wheels, here of one for another platform. tests/test_locks.py finds what is missing in such a way.
BESIDES = ('intel-cmplr-lib-ur==2024.2.1 ; platform_machine == "x86_64" and sys_platform == "linux"',)
OPTIONS = (
    "--universal",
    f"--python-version={OLDEST_PYTHON}",
    "--upgrade",
    "--generate-hashes",
    "--no-emit-index-url",
    "--no-emit-find-links",
    "--no-annotate",
    "--custom-compile-command=make lock",
    "--quiet",
)


def compile_lock(device: str, folder: Path) -> int:
    """Write the lock file of a device; return uv's exit status.

    Args:
        device: "cpu" or "cuda".
        folder: For temporary files.
    """
    command = [
        "uv",
        "pip",
        "compile",
        "pyproject.toml",
        *OPTIONS,
        f"--output-file={lock_path(device).relative_to(ROOT)}",
    ]
    command += [f"--extra={extra}" for extra in (device, *EXTRAS)]
    if device == "cpu":
        excludes, besides = folder / "excludes.txt", folder / "besides.txt"
        excludes.write_text("\n".join(MEDIA_PACKAGES))
        besides.write_text("\n".join(BESIDES))
        command += [str(besides), f"--excludes={excludes}", "--no-emit-package=torch"]
    return run(*command, env=uv_environment()).returncode


def main() -> int:
    """Write both lock files; return the exit status."""
    if shutil.which("uv") is None:
        print("There is no uv on the PATH. Run `make lock`, which sets one up.", file=sys.stderr)
        return 1
    lock_path("cpu").parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        return max(compile_lock(device, Path(folder)) for device in ("cpu", "cuda"))


if __name__ == "__main__":
    sys.exit(main())
