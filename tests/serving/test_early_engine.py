"""The engine's process is started before vLLM asks for it, where that is safe, and nothing is left of it otherwise."""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from casa_serving import cli, early_engine, serve
from casa_serving.early_engine import EarlyContext, replace_engine_process
from early_programs import QuickEngine, SlowEngine, engine
from serving_process import CASA_SERVE, casa_serve
from waiting import until

PROGRAM = Path(__file__).parents[1] / "support" / "early_programs.py"
WITHOUT_TORCH_SETTINGS = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "TORCH"))}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--port 8000",
        "--port=8000 --enforce-eager",
        "--max_num_seqs 8 --live-max-sessions 0",
        "--api-key one two --host 127.0.0.1",
        "--allow-loopback-media --allowed-media-domains example.org",
    ],
)
def test_lines_that_serve_the_embedded_model(line):
    assert serve.is_known(line.split())


@pytest.mark.parametrize(
    "line",
    [
        "./model",
        "--help",
        "-h",
        "--help=CASA",
        "--port 8000 ./model",
        "--port",
        "--port --enforce-eager",
        "--enforce-eager ./model",
        "--enforce-eager=yes",
        "--port=8000 ./model",
        "--api-key",
        "--model ./model",
        "--config options.yaml",
        "--ray",
        "--api-server-count 2",
        "--tensor-parallel-size 2",
        "--data-parallel-size 2",
        "--no-enforce-eager",
        "--grpc",
        "--headless",
        "--numa-bind",
        "--mm-tensor-ipc torch_shm",
        "-- ./model",
    ],
)
def test_lines_that_may_need_another_process(line):
    assert not serve.is_known(line.split())


def test_the_options_take_what_is_said_of_them():
    parser = cli.build_parser({})
    subcommands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    actions = subcommands.choices["serve"]._option_string_actions
    assert {actions[name].nargs for name in serve.OPTIONS} == {None}
    assert {actions[name].nargs for name in serve.LISTS} == {"+"}
    assert {actions[name].nargs for name in serve.FLAGS} == {0}


def test_the_platform_is_vllms():
    assert serve.is_built_for_cpu() == cli.runs_on_cpu()


def start(*arguments, path="-"):
    """Start a program of early_programs.py; return it and the number of its engine's process."""
    command = [sys.executable, "-P", PROGRAM, *arguments, path]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=WITHOUT_TORCH_SETTINGS, process_group=0
    )
    lines = []
    while not lines or not lines[-1].startswith("pid"):
        lines.append(process.stdout.readline())
    return process, int(lines[-1].split()[1])


def test_the_engine_finds_the_environment_of_the_server(tmp_path):
    program, pid = start("quick", "use", path=tmp_path / "facts")
    output, errors = program.communicate(timeout=60)
    assert (program.returncode, errors) == (0, "")
    assert "prepared 1\n" in output  # The imports found what torch reads when it is imported.
    assert output.endswith("ended 0\n")
    libraries = len(early_engine.preloaded_libraries()) > 0
    facts = ["yes", None, "1", True, libraries, "VLLM::EngineCore"]
    assert (tmp_path / "facts").read_text() == f"{pid} {program.pid} {facts}"


@pytest.mark.parametrize("kind", ["quick", "slow", "broken"])
@pytest.mark.parametrize("end", ["return", "error"])
def test_a_process_that_is_not_used_ends_with_the_server(kind, end):
    program, pid = start(kind, end)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == (1 if end == "error" else 0)
    assert "the end" in errors if end == "error" else errors == ""
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("kind", ["quick", "slow"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_a_server_that_is_killed(kind, number):
    program, _ = start(kind, "wait")
    started = psutil.Process(program.pid).children()
    assert len(started) == 2  # Python's resource tracker too.
    while program.stdout.readline() not in ("prepared 1\n", "begun\n"):
        pass
    program.send_signal(number)
    program.wait(10)
    assert psutil.wait_procs(started, timeout=20)[1] == []
    assert program.stderr.read() == ""


def test_an_engine_ends_with_a_server_that_is_killed(tmp_path):
    path = tmp_path / "serves"
    program, _ = start("quick", "serve", path=path)
    started = psutil.Process(program.pid).children()
    until(path.exists)
    program.kill()
    program.wait(10)
    assert psutil.wait_procs(started, timeout=20)[1] == []


def test_ctrl_c_is_the_servers_alone():
    program, pid = start("slow", "wait")
    os.killpg(program.pid, signal.SIGINT)  # Perhaps before it runs its first line.
    _, errors = program.communicate(timeout=20)
    assert errors.count("KeyboardInterrupt") == 1
    assert not psutil.pid_exists(pid)


def test_imports_that_fail_are_told_when_the_process_is_needed(tmp_path):
    program, _ = start("broken", "use", path=tmp_path / "facts")
    output, errors = program.communicate(timeout=60)
    assert output.endswith("ended 1\n")
    assert errors.endswith("ImportError: no such library\n")
    assert not (tmp_path / "facts").exists()


@pytest.fixture
def warnings(monkeypatch):
    """What is warned of, whoever has configured vLLM's loggers meanwhile."""
    found = []
    monkeypatch.setattr(early_engine.logger, "warning", lambda text, *values: found.append(text % values))
    return found


@pytest.fixture
def begun(monkeypatch):
    """Start processes, in an environment that is the engine's already."""
    processes = []

    def begin(kind):
        processes.append(kind.begin())
        for name, value in processes[-1].started_with.items():
            monkeypatch.setenv(name, value)
        return processes[-1]

    yield begin
    for process in processes:
        process.discard()


def running(group):
    """Processes of a group, without those that have ended and wait for whoever inherited them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def refused(early, warnings, name="EngineCore"):
    """Ask for a process, which must be another one; return the warning."""
    process = EarlyContext(early).Process(target=engine, name=name, kwargs={})
    assert process is not early
    assert process.name == name
    assert not early.is_alive()
    return warnings[-1]


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE", "LD_PRELOAD", "MALLOC_ARENA_MAX"])
def test_another_environment_takes_another_process(begun, monkeypatch, warnings, name):
    early = begun(SlowEngine)
    monkeypatch.setenv(name, "7")
    assert f"started with another {name}. Another is started." in refused(early, warnings)


def test_a_process_that_has_ended_is_not_used(begun, warnings):
    early = begun(SlowEngine)
    early.kill()
    early.join()
    assert "it has ended with -9. Another is started." in refused(early, warnings)


def test_one_of_several_engines_is_not_started_early(begun, warnings):
    assert "the engine is EngineCore_DP0." in refused(begun(QuickEngine), warnings, "EngineCore_DP0")


def test_another_vllm_is_noticed(monkeypatch):
    from vllm.v1.engine import utils

    def init(self, context):
        self.processes = [context.Process()]

    before = utils.get_mp_context
    monkeypatch.setattr(utils.CoreEngineProcManager, "__init__", init)
    with pytest.raises(RuntimeError, match=r"CoreEngineProcManager has changed: see what casa_serving\.early_engine"):
        replace_engine_process(None)
    assert utils.get_mp_context is before


def test_vllm_gets_the_process(monkeypatch):
    from vllm.v1.engine import utils

    monkeypatch.setattr(utils, "get_mp_context", utils.get_mp_context)
    replace_engine_process(None)
    assert isinstance(utils.get_mp_context(), EarlyContext)


@pytest.mark.vllm
def test_the_engine_of_a_real_server_was_started_early(server):
    """It imports while the server does, and vLLM starts no other."""
    text = server.log.read_text()
    [pid] = re.findall(r"The engine's process is (\d+), which was started early", text)
    assert f"(EngineCore pid={pid})" in text
    assert psutil.Process(int(pid)).ppid() == server.process.pid
    assert psutil.Process(int(pid)).cmdline()[0] == "VLLM::EngineCore"
    assert "Another is started" not in text
    others = {each.pid for each in psutil.Process(server.process.pid).children()} - {int(pid)}
    assert not [pid for pid in others if "resource_tracker" not in " ".join(psutil.Process(pid).cmdline())]


@pytest.mark.vllm
@pytest.mark.parametrize("arguments", [["--port", "99999"], ["--max-image-bytes", "0"], ["--port", "many"]])
def test_nothing_is_left_of_a_line_that_is_refused(arguments):
    run = subprocess.Popen(
        [CASA_SERVE, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    )
    _, errors = run.communicate(timeout=150)  # The pipe is closed when no process has it any more.
    assert run.returncode in (1, 2)
    assert "Traceback" not in errors
    assert "leaked" not in errors
    until(lambda: not running(run.pid), 20)


@pytest.mark.slow
@pytest.mark.vllm
def test_nothing_is_left_of_a_real_server_that_is_killed(tmp_path):
    shared = set(os.listdir("/dev/shm"))
    with casa_serve(tmp_path / "log.txt", "--enforce-eager") as server:
        started = psutil.Process(server.process.pid).children(recursive=True)
        assert len(started) == 2
        server.process.kill()
        assert psutil.wait_procs(started, timeout=20)[1] == []
    assert not {name for name in set(os.listdir("/dev/shm")) - shared if "casa" in name or "sem.mp" in name}


@pytest.mark.slow
@pytest.mark.vllm
def test_nothing_is_left_of_two_interrupts_during_the_imports(tmp_path):
    """A terminal's Ctrl-C, which all processes get, as soon as the engine's process is there."""
    with (tmp_path / "log.txt").open("w") as log:
        server = subprocess.Popen([CASA_SERVE], stdout=log, stderr=log, process_group=0)
    until(lambda: len(psutil.Process(server.pid).children()) == 2)
    started = psutil.Process(server.pid).children()
    for _ in range(2):
        os.killpg(server.pid, signal.SIGINT)
    assert server.wait(20) == 130
    assert psutil.wait_procs(started, timeout=20)[1] == []
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
