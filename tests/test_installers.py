"""Packages come through uv, told what pip was told, and through pip where uv is missing or fails."""

import stat
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def installers(monkeypatch):
    """The file as a module."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import installers

    return installers


LISTING = """:env:.find-links='/more/wheels ~/wheels'
:env:.timeout='30'
global.extra-index-url='\\nsimple-a\\nsimple-b'
global.find-links='/wheels'
global.index-url='simple'
install.index-url='simple-for-install'
download.index-url='simple-for-download'
global.cert='/certificates.pem'
global.trusted-host='somewhere'
"""


def test_pips_settings_are_those_of_its_command_install(installers):
    settings = installers.pip_settings(LISTING)
    assert settings["index-url"] == "simple-for-install"
    assert settings["find-links"] == "/more/wheels ~/wheels"


def test_uv_is_told_what_pip_was_told(installers, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    variables = installers.uv_variables(installers.pip_settings(LISTING), {})
    assert variables == {
        "UV_DEFAULT_INDEX": "simple-for-install",
        "UV_INDEX": "simple-a simple-b",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/more/wheels,/home/somebody/wheels",
        "UV_HTTP_TIMEOUT": "30",
        "UV_INSECURE_HOST": "somewhere",
        "SSL_CERT_FILE": "/certificates.pem",
    }


def test_what_uv_was_told_itself_stays(installers):
    variables = installers.uv_variables({"find-links": "/wheels", "no-index": "1"}, {"UV_FIND_LINKS": "/own"})
    assert variables == {"UV_NO_INDEX": "1"}


def test_pips_own_listing_is_understood(installers, monkeypatch):
    """As the pip that is here prints it, with one value and with several."""
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "simple-a simple-b")
    monkeypatch.setenv("PIP_FIND_LINKS", "/it's here")
    monkeypatch.delenv("UV_INDEX", raising=False)
    monkeypatch.delenv("UV_FIND_LINKS", raising=False)
    variables = installers.uv_environment()
    assert variables["UV_INDEX"] == "simple-a simple-b"
    assert variables["UV_FIND_LINKS"] == "/it's,here"


@pytest.fixture
def wheels(tmp_path):
    """A folder with one package, and nothing else to be found."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "found_here.py").write_text("")
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "found-here"\nversion = "1.0"\n[tool.setuptools]\npy-modules = ["found_here"]\n'
    )
    folder = tmp_path / "wheels"
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run([sys.executable, *command], check=True)
    return folder


def put_uv_on_the_path(folder, text, monkeypatch):
    folder.mkdir()
    fake = folder / "uv"
    fake.write_text(f"#!/bin/sh\n{text}\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize("kind", ["real uv", "uv that fails", "no uv"])
def test_a_package_is_found_where_pip_was_told_to_look(installers, tmp_path, wheels, monkeypatch, capfd, kind):
    if kind == "real uv":
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
        assert installers.shutil.which("uv")
    if kind == "uv that fails":
        put_uv_on_the_path(tmp_path / "bin", "exit 2", monkeypatch)
    if kind == "no uv":
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for name in ("UV_FIND_LINKS", "UV_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    venv.create(tmp_path / "environment", with_pip=True)
    python = tmp_path / "environment" / "bin" / "python"
    installer = installers.Installer(python)
    installer.install("--no-deps", "found-here==1.0")
    # Compiled, and by its time: by its hash each import would read the source too.
    (compiled,) = python.parent.parent.rglob("found_here.*.pyc")
    assert compiled.read_bytes()[4:8] == bytes(4)
    subprocess.run([python, "-c", "import found_here"], check=True)
    assert ("trying pip" in capfd.readouterr().out) == (kind == "uv that fails")
    with pytest.raises(installers.InstallError, match="no-such-thing"):
        installer.install("--no-deps", "no-such-thing==1.0")


@pytest.fixture
def without_uv(tmp_path, monkeypatch):
    """A new environment on a machine that has no uv."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    venv.create(tmp_path / "environment", with_pip=True)
    return tmp_path / "environment" / "bin" / "python"


def test_without_the_locked_uv_pip_does_it_all(installers, without_uv, wheels, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    installer = installers.Installer(without_uv)
    installer.get_uv(ROOT / "locks" / "cpu.txt")
    assert "pip installs everything, which takes longer" in capfd.readouterr().out
    installer.install("--no-deps", "found-here==1.0")
    subprocess.run([without_uv, "-c", "import found_here"], check=True)


def test_a_lock_without_uv_is_no_obstacle(installers, without_uv, tmp_path, capfd):
    (tmp_path / "old.txt").write_text("numpy==2.0\n")
    installers.Installer(without_uv).get_uv(tmp_path / "old.txt")
    assert "old.txt has no uv; make lock" in capfd.readouterr().out


@pytest.mark.slow
def test_the_locked_uv_is_installed_first(installers, without_uv):
    """From the index, into the environment itself."""
    installers.Installer(without_uv).get_uv(ROOT / "locks" / "cpu.txt")
    found = subprocess.run([without_uv.with_name("uv"), "--version"], capture_output=True, text=True, check=True)
    assert f"uv=={found.stdout.split()[1]} " in installers.lock_entry(ROOT / "locks" / "cuda.txt", "uv")
