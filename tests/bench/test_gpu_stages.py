"""How the stages of benchmarks/gpu run, without what they measure (that is tried by `run.py --tiny`, docs/gpu.md)."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks" / "gpu"
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin"}


def module(name):
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", GPU / f"{name}.py")
    loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


run, report = module("run"), module("report")


def test_each_command_names_a_script_and_all_default_stages_fit_into_fifteen_minutes():
    for stage in run.STAGES.values():
        for script, *arguments in run.commands_of(stage, run.LARGE):
            assert (GPU / script).is_file()
            assert not {"PRESET", "LARGEST"} & set(arguments)
    # The machine starts and is given back in the same fifteen minutes.
    assert sum(stage.limit_s for stage in run.STAGES.values() if stage.is_default) <= 13 * 60


@pytest.mark.parametrize("names", [("kernels", "parity", "decode"), ("live", "flat")])
def test_the_commands_for_a_lent_machine(names):
    assert f"run.py {' '.join(names)}" in (ROOT / "docs" / "gpu.md").read_text()
    assert sum(run.STAGES[name].limit_s for name in names) <= 590
    # Each leaves its figures and its log; the machine's description comes with them.
    assert 2 * len(names) + 1 <= 8


def test_both_published_sizes_come_before_what_they_stand_beside():
    models = [command[1] for command in run.commands_of(run.STAGES["decode"], run.LARGE)]
    assert models == [*run.LARGE, *(f"plain:{preset}" for preset in run.LARGE)]


def test_a_command_is_cut_off_with_what_it_has_started_and_its_output_is_kept(tmp_path):
    """An engine that is left alone would hold the GPU's memory, and the pipe."""
    log, begun = tmp_path / "log", time.monotonic()
    script = "import subprocess, time; print('measured', flush=True); subprocess.Popen(['sleep', '99']); time.sleep(99)"
    with log.open("w") as file:
        status = run.run([sys.executable, "-c", script], time.monotonic() + 4, file, ENVIRONMENT)
    assert status.startswith("CUT OFF")
    assert time.monotonic() - begun < 60
    assert log.read_text() == "measured\n"


@pytest.mark.parametrize(("code", "status"), [(0, "done"), (3, "FAILED (3)")])
def test_how_a_command_ended(code, status, tmp_path):
    with (tmp_path / "log").open("w") as file:
        command = [sys.executable, "-c", f"raise SystemExit({code})"]
        assert run.run(command, time.monotonic() + 60, file, ENVIRONMENT) == status
        assert run.run(command, time.monotonic(), file, ENVIRONMENT).startswith("not started")


def test_one_table_of_all_stages(tmp_path):
    step = {"what": "decode step", "case": "2B, 32 sequences", "value": 2.0, "unit": "ms", "floor": 1.6}
    wrong = {
        "what": "logprobs differ",
        "case": "llama-ca",
        "value": float("nan"),
        "unit": "",
        "floor": None,
        "bound": 0.1,
    }
    (tmp_path / "decode.jsonl").write_text(json.dumps(step) + "\n")
    (tmp_path / "parity.jsonl").write_text(json.dumps(wrong) + "\n")
    (tmp_path / "machine.json").write_text(json.dumps({"GPU": "NVIDIA H200"}))
    done = subprocess.run([sys.executable, str(GPU / "report.py"), str(tmp_path)], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "GPU NVIDIA H200"
    assert "| decode | decode step | 2B, 32 sequences | 2 ms | 1.600 | 1.25 | 16000 |" in lines
    assert "| parity | logprobs differ | llama-ca | nan (TOO MUCH) |  |  |  |" in lines


def test_no_results_are_an_error(tmp_path):
    done = subprocess.run([sys.executable, str(GPU / "report.py"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "no results" in done.stderr
