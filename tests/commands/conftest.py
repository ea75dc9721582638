"""The distributions of this checkout, built from a clean copy, and fresh environments to install them in."""

import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# What is in a folder that somebody works in, and in no checkout.
NOT_THERE = (".git", ".venv*", "*.egg-info", "build", "dist", "runs", "shared", "__pycache__", ".*_cache")
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


@pytest.fixture(scope="package")
def sdist(tmp_path_factory):
    """The source distribution, unpacked: its folder."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*NOT_THERE), symlinks=True)
    subprocess.run([sys.executable, "-c", BUILD_SDIST, folder], cwd=folder / "copy", check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="package")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the source distribution as `python -m build` does, with the locked setuptools."""
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(sdist, folder / "source")  # Building leaves files there.
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run([sys.executable, *map(str, command)], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture
def requirements(monkeypatch):
    """What the set-up installs."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import requirements

    return requirements


@pytest.fixture
def environment(tmp_path, requirements):
    """A fresh virtual environment: its folder of commands, and the set-up's installer for it, with uv as there."""
    from installers import Installer

    venv.create(tmp_path / "environment", with_pip=True)
    bin_folder = tmp_path / "environment" / "bin"
    installer = Installer(bin_folder / "python")
    installer.get_uv(requirements.lock_path("cpu"))
    return bin_folder, installer
