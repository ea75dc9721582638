"""The engine's counters come to the servers; of engines that have ended, or were killed, nothing is left."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from prometheus_client import generate_latest
from vllm.v1.metrics.prometheus import get_prometheus_registry

from casa_engine.errors import ConfigError
from casa_vllm.engine_counters import EngineCounters, EngineCountersReader, engine_folder, folder_prefix
from casa_vllm.metric_names import COUNTERS, GAUGES

VALUES = {name: 10 + number for number, name in enumerate([*COUNTERS, *GAUGES])}
# An engine that has counted and does not end.
ENGINE = """
import signal, sys
from types import SimpleNamespace
from casa_vllm.engine_counters import EngineCounters
counters = EngineCounters(
    SimpleNamespace(instance_id=sys.argv[1], model_config=SimpleNamespace(served_model_name="casa"))
)
print("ready", flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Where the folders of this test's engines are."""
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(tmp_path))
    return tmp_path


def config(instance="17", model="casa"):
    return SimpleNamespace(instance_id=instance, model_config=SimpleNamespace(served_model_name=model))


def test_a_server_reads_what_the_engine_has_counted():
    counters = EngineCounters(config())
    reader = EngineCountersReader(config())
    assert reader.read() == dict.fromkeys(VALUES, 0)
    counters.write(VALUES)
    assert reader.read() == VALUES
    EngineCounters(config("18")).write(dict.fromkeys(VALUES, 1))
    assert reader.read() == VALUES
    counters.close()
    counters.close()


def test_nothing_is_left_of_an_engine_that_is_killed_while_it_serves(folders):
    engine = run_engine("17")
    reader = EngineCountersReader(config("17"))
    assert not list(folders.iterdir())
    engine.kill()
    engine.wait()
    assert reader.read() == dict.fromkeys(VALUES, 0)


def test_nobody_else_can_read_them():
    counters = EngineCounters(config())
    folder = engine_folder(config())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600, 0o600]
    counters.close()


@pytest.mark.parametrize("end", [EngineCounters.close, lambda counters: None])
def test_an_engine_that_ends_removes_its_folder(folders, end):
    counters = EngineCounters(config())
    assert list(folders.iterdir())
    end(counters)
    del counters
    assert not list(folders.iterdir())


def refused():
    return pytest.raises(ConfigError, match=r"need a new folder .*, got: .* VLLM_RPC_BASE_PATH")


def test_a_link_in_the_way_is_neither_followed_nor_changed(folders):
    target = folders / "target"
    target.mkdir()
    engine_folder(config()).symlink_to(target)
    with refused():
        EngineCounters(config())
    assert {path.name for path in folders.iterdir()} == {"target", engine_folder(config()).name}
    assert engine_folder(config()).is_symlink()
    assert not list(target.iterdir())


def test_two_engines_of_one_name_do_not_share_a_folder():
    first = EngineCounters(config())
    first.write(VALUES)
    with refused():
        EngineCounters(config())
    assert EngineCountersReader(config()).read() == VALUES
    first.close()


def test_folders_of_engines_that_were_killed_before_are_removed(folders):
    engines = {name: run_engine(name) for name in ("killed", "living")}
    engines["killed"].send_signal(signal.SIGKILL)
    engines["killed"].wait()
    assert {path.name.rpartition("-")[2] for path in folders.iterdir()} == {"killed", "living"}
    next_one = EngineCounters(config("next"))
    assert {path.name.rpartition("-")[2] for path in folders.iterdir()} == {"next", "living"}
    assert EngineCountersReader(config("living")).read() == dict.fromkeys(VALUES, 0)
    next_one.close()
    engines["living"].kill()
    engines["living"].wait()


def test_folders_of_engines_that_were_killed_before_they_had_a_name_are_removed(folders):
    old, new = (folders / f".{folder_prefix()}{name}" for name in ("old", "new"))
    old.mkdir()
    new.mkdir()  # Its engine locks it in a moment.
    os.utime(old, (0, 0))
    EngineCounters(config()).close()
    assert list(folders.iterdir()) == [new]


def test_servers_that_share_a_folder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"PROMETHEUS_MULTIPROC_DIR.*got: No such file or directory"):
        EngineCounters(config())


def run_engine(name):
    engine = subprocess.Popen([sys.executable, "-c", ENGINE, name], stdout=subprocess.PIPE, text=True)
    assert engine.stdout.readline() == "ready\n"
    return engine


def test_a_forked_child_leaves_the_folder_alone():
    counters = EngineCounters(config())
    child = os.fork()
    if not child:
        counters.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert EngineCountersReader(config()).read() == dict.fromkeys(VALUES, 0)
    counters.close()


def test_an_engine_of_another_machine_is_not_read():
    with pytest.raises(FileNotFoundError, match=r"casa-engine-counters-\d+-17"):
        EngineCountersReader(config())


def test_any_of_several_servers_answers_for_the_engine(tmp_path, monkeypatch):
    """vLLM sends a step's stats to any of them: what each would count from its own stats is no sum of anything."""
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(shared))
    counters = EngineCounters(config(model='a "quoted" name'))
    counters.write(VALUES)
    text = generate_latest(get_prometheus_registry()).decode()
    labels = '{engine="0",model_name="a \\"quoted\\" name"}'
    for name in COUNTERS:
        assert f"# TYPE casa:{name}_total counter\n" in text
        assert f"casa:{name}_total{labels} {VALUES[name]}.0\n" in text
    for name in GAUGES:
        assert f"# TYPE casa:{name} gauge\n" in text
        assert f"casa:{name}{labels} {VALUES[name]}.0\n" in text
    counters.close()
    assert list(tmp_path.iterdir()) == [shared]
