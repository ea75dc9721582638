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


run, goals = module("run"), module("goals")


def test_each_command_names_a_script_and_all_default_stages_leave_room_in_fifteen_minutes():
    for stage in run.STAGES.values():
        for script, *arguments in run.commands_of(stage, run.LARGE):
            assert (GPU / script).is_file()
            assert not {"PRESET", "LARGEST"} & set(arguments)
    # In the same fifteen minutes the machine starts, vLLM is unpacked, and results are brought back.
    assert sum(stage.limit_s for stage in run.STAGES.values() if stage.is_default) <= 710


@pytest.mark.parametrize("names", [("kernels", "parity", "decode"), ("live",)])
def test_the_commands_for_a_lent_machine(names):
    lines = (ROOT / "docs" / "gpu.md").read_text().splitlines()
    (command,) = [line for line in lines if "/tmp/kit" in line and line.endswith(f"run.py {' '.join(names)}")]
    assert "test -d /tmp/kit/site/vllm && " in command, "with a piece of the kit missing it would run without vLLM"
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
        "(EngineCore pid=603) \n",
        "\n",
        "WARNING 11-27 18:21:12 [envs.py:1] unknown variable\n",
        "decode step, 1 sequences: 1.2 ms\n",
    ]
    with (tmp_path / "log").open("w") as file:
        run.show(lines, file)
    assert (tmp_path / "log").read_text() == "".join(lines)
    assert capsys.readouterr().out == "".join(lines[5:])


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


def test_one_kernel_that_does_not_compile_hides_no_other():
    """Triton's errors are plain Exceptions."""
    code = """
from kernel_checks import outcome

class OutOfResources(Exception):
    pass

def differs():
    assert False

def does_not_compile():
    raise OutOfResources("shared memory")

print(*map(outcome, (lambda: None, lambda: 0.25, differs, does_not_compile)))
"""
    assert run_python(code).stdout.splitlines()[-1] == "0.0 0.25 1.0 nan"


def test_one_engine_that_fails_hides_no_other():
    """It is closed, and counts as a difference."""
    code = """
import parity

class Engine:
    def __init__(self, fails, **options):
        if fails == "start":
            raise TypeError("unknown option")
        self.fails = fails

    def ask(self, *request):
        if self.fails == "answer":
            raise KeyError("request")

    def close(self):
        print("closed")
        if self.fails == "end":
            raise OSError("cannot end")

parity.Engine, parity.greatest_difference = Engine, lambda *answers: 0.5
for fails in ("start", "answer", "end", "nowhere"):
    print(parity.difference_of(fails, None, "bfloat16", {}))
"""
    done = run_python(code)
    assert done.stdout.split() == ["nan", "closed", "nan", "closed", "nan", "closed", "0.5"], done.stderr
    assert all(error in done.stderr for error in ("TypeError", "KeyError", "OSError"))


def run_python(code):
    """Run code where a stage's scripts run."""
    variables = run.environment("parity", is_tiny=True)
    variables["PYTHONPATH"] = f"{GPU}:{variables['PYTHONPATH']}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)


def row(what, case, value, unit="ms", floor=None, **fields):
    return {"what": what, "case": case, "value": value, "unit": unit, "floor": floor, **fields}


def write_stages(folder, machine, **stages):
    folder.mkdir()
    (folder / "machine.json").write_text(json.dumps(machine))
    for name, rows in stages.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(folder)


def report(*folders):
    return subprocess.run([sys.executable, str(GPU / "report.py"), *folders], capture_output=True, text=True)


def test_one_table_of_all_stages_and_commands(tmp_path):
    """In the order of the stages, whichever file was copied back first."""
    live = write_stages(
        tmp_path / "second",
        {"GPU": "NVIDIA H100"},
        live=[row("sessions within the bound", "CASA-Helium1-VL-2B", 128, "")],
    )
    first = write_stages(
        tmp_path / "first",
        {"GPU": "NVIDIA H200"},
        decode=[row("decode step", "CASA-Helium1-VL-2B, 128 sequences, 896 px image each", 4.0, floor=3.0)],
        parity=[row("logprobs differ", "llama-ca", float("nan"), "", bound=0.1)],
    )
    done = report(live, first)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("GPU")] == [
        "GPU NVIDIA H100 (live)",
        "GPU NVIDIA H200 (parity, decode)",
    ]
    case = "CASA-Helium1-VL-2B, 128 sequences, 896 px image each"
    assert lines[-3:] == [
        "| parity | logprobs differ | llama-ca | nan (TOO MUCH) |  |  |  |  |",
        f"| decode | decode step | {case} | 4 ms | <= 5 | 3.000 | 1.33 | 32000 |",
        "| live | sessions within the bound | CASA-Helium1-VL-2B | 128 | >= 192 MISSED |  |  |  |",
    ]


def test_a_tiny_run_has_no_goals(tmp_path):
    case = "CASA-Helium1-VL-2B, 1 sequences, 896 px image each"
    done = report(write_stages(tmp_path / "tiny", {"tiny": True}, decode=[row("decode step", case, 9.0, floor=1.0)]))
    assert done.stdout.splitlines()[-1] == f"| decode | decode step | {case} | 9 ms |  |  |  | 111 |"


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (row("decode step", "CASA-Helium1-VL-2B, 1 sequences, 896 px image each", 1.4, floor=1.0), "<= 1.429"),
        (row("decode step", "CASA-Qwen2_5-VL-3B-LiveCC, 1 sequences, 896 px", 2.2, floor=1.6), "<= 2.128 MISSED"),
        (row("decode step", "CASA-Helium1-VL-2B (compile), 1 sequences, 896 px", 1.5, floor=1.0), "<= 1.429 MISSED"),
        (row("decode step", "plain:CASA-Helium1-VL-2B, 1 sequences", 1.4, floor=1.0), ""),
        (row("decode step", "CASA-Helium1-VL-2B, 32 sequences, 896 px image each", 1.4, floor=1.0), ""),
        (row("first token", "CASA-Qwen2_5-VL-3B-LiveCC, 896 px", 17.0, floor=8.8), "<= 16 MISSED"),
        (row("first token", "CASA-Helium1-VL-2B, 448 px", 17.0, floor=2.8), ""),
        (row("sessions within the bound", "CASA-Helium1-VL-2B", 192, ""), ">= 192"),
        (row("ratio of both", "CASA-Helium1-VL-2B", float("nan"), ""), "<= 1.05 MISSED"),
    ],
)
def test_goals(measured, expected):
    assert goals.goal(measured) == expected


def test_no_results_are_an_error(tmp_path):
    done = report(str(tmp_path))
    assert done.returncode == 1 and "no results" in done.stderr
