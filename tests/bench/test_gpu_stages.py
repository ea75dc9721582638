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


def test_each_command_names_a_script_and_all_default_stages_leave_room_in_fifteen_minutes():
    for stage in run.STAGES.values():
        for script, *arguments in run.commands_of(stage, run.LARGE):
            assert (GPU / script).is_file()
            assert not {"PRESET", "LARGEST"} & set(arguments)
    # In the same fifteen minutes the machine starts, vLLM is unpacked, and results are brought back.
    assert sum(stage.limit_s for stage in run.STAGES.values() if stage.is_default) <= 710


@pytest.mark.parametrize("names", [("kernels", "parity", "decode"), ("live",)])
def test_the_commands_for_a_lent_machine(names):
    assert f"run.py {' '.join(names)}" in (ROOT / "docs" / "gpu.md").read_text()
    assert sum(run.STAGES[name].limit_s for name in names) <= 560, "unpacking comes beside"
    # Each leaves its figures and its log; the machine's description comes with them.
    assert 2 * len(names) + 1 <= 8


def test_the_limits_in_the_documentation():
    lines = (ROOT / "docs" / "gpu.md").read_text().splitlines()
    for name, stage in run.STAGES.items():
        (row,) = [line for line in lines if line.startswith(f"| `{name}` | {stage.limit_s} |")]
        assert ("not by default" in row) == (not stage.is_default)


def test_steps_are_watched_where_no_time_is_measured(monkeypatch):
    """Watching wraps each step and prints each wait."""
    monkeypatch.setenv("VLLM_GPU_SYNC_CHECK", "warn")
    checks = {name: run.environment(name, is_tiny=False).get("VLLM_GPU_SYNC_CHECK") for name in run.STAGES}
    assert {name: check for name, check in checks.items() if check} == {"kernels": "error", "parity": "warn"}


def test_waits_are_counted(tmp_path):
    (tmp_path / "parity.log").write_text(
        "/a/b.py:7: UserWarning: called a synchronizing CUDA operation (Triggered internally at x.cpp:85.)\n"
        "  tokens = ids.tolist()\n"
        "RuntimeError: GPU<->CPU sync detected - avoid it or wrap with gpu_sync_allowed()\n"
    )
    run.add_waits("parity", tmp_path)
    row = json.loads((tmp_path / "parity.jsonl").read_text())
    assert row["value"] == 2 and row["bound"] == 0


def test_what_explains_a_run_is_for_the_log_alone(tmp_path, capsys):
    lines = [
        "INFO 11-27 18:21:11 [core.py:101] Initializing a V1 LLM engine\n",
        "(EngineCore pid=603) INFO 11-27 18:21:11 [gpu_worker.py:9] memory\n",
        "Capturing CUDA graphs:  50%|#####     | 4/8 [00:01<00:01,  3.10it/s]\n",
        "WARNING 11-27 18:21:12 [envs.py:1] unknown variable\n",
        "decode step, 1 sequences: 1.2 ms\n",
    ]
    with (tmp_path / "log").open("w") as file:
        run.show(lines, file)
    assert (tmp_path / "log").read_text() == "".join(lines)
    assert capsys.readouterr().out == "".join(lines[3:])


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
