"""Installs packages into an environment: with uv, or with the environment's own pip where there is none.

uv downloads and compiles in parallel and links files instead of copying them, but it does not read pip's
configuration. A machine whose pip is configured with an index, a folder of wheels, a proxy or a certificate needs
nothing more: `uv_variables` hands those settings on. Where uv fails all the same, pip has the last word.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from requirements import MEDIA_PACKAGES, ROOT

# Later ones win, as in pip.
PIP_SECTIONS = ("global", "install", ":env:")
# pip's setting, uv's variable, and what stands between several values there.
HANDED_ON = (
    ("index-url", "UV_DEFAULT_INDEX", " "),
    ("extra-index-url", "UV_INDEX", " "),
    ("find-links", "UV_FIND_LINKS", ","),
    ("no-index", "UV_NO_INDEX", " "),
    ("trusted-host", "UV_INSECURE_HOST", " "),
    ("default-timeout", "UV_HTTP_TIMEOUT", " "),
    ("timeout", "UV_HTTP_TIMEOUT", " "),
    ("cert", "SSL_CERT_FILE", " "),
    ("proxy", "ALL_PROXY", " "),
)


class InstallError(Exception):
    """No installer could do it; the message is the command that failed."""


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout; its output goes to the terminal unless captured."""
    return subprocess.run([str(part) for part in command], cwd=ROOT, text=True, check=False, **options)


def pip_settings(listing: str) -> dict[str, str]:
    """Return pip's settings for `pip install` from what `pip config list` prints, by their names."""
    found: dict[tuple[str, str], str] = {}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in PIP_SECTIONS:
            found[section, name] = str(ast.literal_eval(value))
    return {name: found[section, name] for section, name in sorted(found, key=lambda key: PIP_SECTIONS.index(key[0]))}


def uv_variables(settings: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which uv finds what pip would find.

    Args:
        settings: pip's settings by name.
        environment: What is set already, which uv's user meant for uv and which therefore stays.
    """
    variables = {}
    for name, variable, separator in HANDED_ON:
        if name in settings:
            values = settings[name].split()
            variables[variable] = separator.join(os.path.expanduser(value) for value in values)
    if "UV_INDEX" in variables:
        # pip takes the best version of all indexes; uv alone would stop at the first index that has any.
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {name: value for name, value in variables.items() if name not in environment}


def lock_entry(lock: Path, name: str) -> str:
    """Return a package's lines of a lock file.

    Raises:
        InstallError: It has none.
    """
    found = re.search(rf"^{re.escape(name)}==.*\\\n(?: +--hash=.*\n)+", lock.read_text(), re.MULTILINE)
    if found is None:
        raise InstallError(f"{lock.name} has no {name}; make lock")
    return found.group()


def uv_environment() -> dict[str, str]:
    """Return this process's environment with pip's settings added for uv."""
    listed = run(sys.executable, "-m", "pip", "config", "list", capture_output=True)
    settings = pip_settings(listed.stdout) if listed.returncode == 0 else {}
    return {**os.environ, **uv_variables(settings, os.environ)}


class Installer:
    """Installs into one environment.

    Attributes:
        python: The environment's Python, which has pip.
    """

    def __init__(self, python: Path) -> None:
        self.python = python
        self._uv = shutil.which("uv") or shutil.which("uv", path=str(python.parent))

    def get_uv(self, lock: Path) -> None:
        """Install the locked uv into the environment where there is none; pip does everything where that fails.

        Args:
            lock: A lock file that names it.
        """
        if self._uv:
            return
        # Without a wheel for this machine it would be built, which needs Rust and minutes.
        options = ("--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes")
        try:
            with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
                file.write(lock_entry(lock, "uv"))
                file.flush()
                self._pip("install", *options, "-r", file.name)
        except InstallError as error:
            print(f"`{error}` failed: pip installs everything, which takes longer", flush=True)
        self._uv = shutil.which("uv", path=str(self.python.parent))

    def install(self, *arguments: str | Path) -> None:
        """Install by `arguments`, which both uv and pip understand.

        Raises:
            InstallError: Neither could; their own words are on the terminal.
        """
        if self._uv and self._try_uv(*arguments):
            return
        self._pip("install", "--quiet", *arguments)

    def resolve(self, wanted: list[str], *, torch: str, upgrade: bool) -> None:
        """Install requirements in the newest versions that fit together, whatever was locked.

        Args:
            wanted: Requirements.
            torch: The exact build of torch that everything must fit.
            upgrade: Whether what is there already gives way to what is newer.
        """
        options = ["--upgrade"] if upgrade else []
        if self._uv:
            with tempfile.NamedTemporaryFile("w", suffix=".txt") as excludes:
                excludes.write("\n".join(MEDIA_PACKAGES if "+cpu" in torch else ()))
                excludes.flush()
                if self._try_uv(*options, "--excludes", excludes.name, torch, *wanted):
                    return
        # torch goes first and alone: once it is there pip exchanges it for nothing that does not fit it.
        self._pip("install", torch)
        if upgrade:
            options += ["--upgrade-strategy", "eager"]
        self._pip("install", *options, torch, *wanted)

    def _try_uv(self, *arguments: str | Path) -> bool:
        """Run `uv pip install`; return whether it succeeded."""
        command = (self._uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", self.python, *arguments)
        # By their times, as pip and Python compile: by their hashes every import would read the source too.
        if run(*command, env={"PYC_INVALIDATION_MODE": "TIMESTAMP", **uv_environment()}).returncode == 0:
            return True
        print("uv failed (see above); trying pip", flush=True)
        return False

    def _pip(self, *arguments: str | Path) -> None:
        """Run the environment's pip; where it fails its own words are on the terminal."""
        if run(self.python, "-m", "pip", "--disable-pip-version-check", *arguments).returncode:
            raise InstallError("pip " + " ".join(map(str, arguments)))
