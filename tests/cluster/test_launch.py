"""`casa-serve --ray` says in one sentence why it cannot start, and takes everything with it when it ends."""

import json
import re
import signal
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from casa_engine.errors import InputError
from casa_serving import cli
from casa_serving.cluster import address, launch
from open_clients import chat, post, stream, watch
from serving_process import CASA_SERVE, START_TIMEOUT_S, casa_serve
from waiting import until

REFUSAL_S = 240


def refused(capsys, tmp_path, text):
    """Run `casa-serve --ray` with a configuration in this process, which must refuse it before Ray is started."""
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    status = cli.run(["--ray", str(path)])
    said = capsys.readouterr().err
    assert status == 1
    assert said.startswith("casa-serve: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("replica: {min: 2}", "there is no key 'replica'"),
        ("replicas: {min: 2, max: 1}", "max (1) is below min (2)"),
        ("checkpoint: /nowhere/model", "The checkpoint '/nowhere/model' does not exist"),
        ("engine: {max_model_length: 100}", "'max_model_length' (did you mean 'max_model_len'?)"),
        ("engine: {allowed_media_domains: [a.b]}", "engine sets ['allowed_media_domains'], which other keys decide"),
        ("engine: {max_num_seqs: 3}", "engine sets ['max_num_seqs'], which other keys decide"),
    ],
)
def test_a_wrong_configuration(capsys, tmp_path, text, said):
    assert said in refused(capsys, tmp_path, text)


def test_a_port_that_is_taken(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = refused(
            capsys,
            tmp_path,
            f"applications: [{{import_path: 'casa_serving.cluster:build_app'}}]\n"
            f"http_options: {{port: {taken.getsockname()[1]}}}\n",
        )
    assert "Nothing can listen on 127.0.0.1:" in said


@pytest.mark.vllm
def test_resources_that_no_machine_has(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("cpus: 1000\ndevice: cpu\n")
    command = [CASA_SERVE, "--ray", path, "--port", "0", "--metrics-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=REFUSAL_S, check=False)
    assert done.returncode == 1
    assert re.search(r"^casa-serve: The cluster cannot hold 1 replicas of 1000 CPU each", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


@pytest.mark.vllm
def test_it_can_be_stopped_while_it_waits_for_a_node(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("cpus: 1000\ndevice: cpu\nwait_for_nodes: true\n")
    with (tmp_path / "log.txt").open("w") as log:
        command = [CASA_SERVE, "--ray", path, "--port", "0", "--metrics-port", "0"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        until(lambda: "Adding 1 replica" in (tmp_path / "log.txt").read_text(), REFUSAL_S)
        started = psutil.Process(process.pid).children(recursive=True)
        assert started
        process.terminate()
        assert process.wait(60) == 130
    finally:
        process.kill()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


@pytest.mark.vllm
@pytest.mark.slow
def test_it_serves_and_takes_everything_with_it(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("device: cpu\nengine: {enforce_eager: true}\n")
    with casa_serve(tmp_path / "log.txt", "--ray", path, "--metrics-port", "0") as server:
        until(lambda: "casa-serve: ready at" in server.log.read_text(), START_TIMEOUT_S)
        models = httpx.get(f"{server.url}/v1/models", timeout=30).json()
        (model,) = models["data"]
        # As casa-serve answers, not as Ray Serve LLM does.
        assert (model["id"], model["max_model_len"]) == ("casa-tiny-digits", 4096)
        assert model["created"] > 0
        started = psutil.Process(server.process.pid).children(recursive=True)
        assert started
        with ThreadPoolExecutor(3) as pool:
            begun = [threading.Event(), threading.Event()]
            streamed = pool.submit(stream, server.url, "/v1/chat/completions", begun[0])
            watched = pool.submit(watch, server.live_url, begun[1])
            answered = pool.submit(post, server.url, chat())
            for event in begun:
                assert event.wait(60)
            server.process.terminate()
            assert server.process.wait(60) == 0
        # Every client was told before Ray took its proxies away.
        before_last, last = streamed.result()
        assert last == "data: [DONE]"
        assert "shutting down" in json.loads(before_last.removeprefix("data: "))["error"]["message"]
        message, code = watched.result()
        assert (message["type"], code) == ("session.closed", 1012)
        assert answered.result().status_code == 503
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "99999"], "argument --port: expected a port from 0 to 65535, got '99999'"),
        (["--port", "-1"], "argument --port"),
        (["--port", "abc"], "argument --port: expected a whole number of at least 0, got 'abc'"),
        (["--port", ""], "argument --port"),
        (["--metrics-port", "65536"], "argument --metrics-port: expected a port from 0 to 65535"),
        (["--num-cpus", "-2"], "argument --num-cpus"),
        (["--num-cpus", "many"], "argument --num-cpus"),
    ],
)
def test_a_number_that_is_none_is_refused_by_the_parser(capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        cli.run(["--ray", *options])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "::", "localhost"])
def test_a_free_port_is_found_at_every_address(host):
    port = address.check_port(host, 0)
    assert address.check_port(host, port) == port


@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::7", "no such host", "1:2"])
def test_an_address_that_this_machine_does_not_have(host):
    with pytest.raises(InputError, match="Nothing can listen on "):
        address.check_port(host, 0)


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("", "127.0.0.1")],
)
def test_the_address_by_which_this_machine_reaches_it(host, url):
    assert address.url_host(address.local(host)) == url


def test_a_signal_waits_until_what_must_be_whole_is_whole():
    done, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), launch.signals_deferred():
        signal.raise_signal(signal.SIGINT)
        done.append("all of it")
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_cluster_that_is_not_there_is_found_out_at_once(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        address.reach(f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    assert cli.run(["--ray"]) == 1
    said = capsys.readouterr().err
    assert "No Ray cluster answers at RAY_ADDRESS='127.0.0.1:" in said
    assert "RAY_AUTH_MODE=token" in said


@pytest.mark.parametrize("text", ["auto", "local", "ray://somewhere.example:10001", ""])
def test_other_addresses_are_judged_by_ray(text):
    address.reach(text)
