"""How a real `casa-serve` ends: every client is told, within the bound, and no process is left."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psutil
import pytest

from image_files import data_url, encoded, plain
from open_clients import STREAMS, chat, post, stream, watch
from serving_process import CASA_SERVE, ENVIRONMENT, casa_serve, free_port

# Each test starts a server of its own, with clients of every kind, so all but the first are slow.
pytestmark = pytest.mark.vllm
TIMEOUT_S = 8
# A busy machine is late with everything, the end of a process too.
SLACK_S = 4


def open_socket(url):
    """Return a connection to the server."""
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def raw_post(url, body, length=None):
    """Send a chat over a socket of its own, of which only the head and `body` come; return the socket."""
    client = open_socket(url)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    client.sendall(f"{head}{length or len(body)}\r\n\r\n{body}".encode())
    return client


def read_all(client):
    """Return what comes until the connection is closed."""
    with client:
        return b"".join(iter(lambda: client.recv(65536), b""))


class Clients:
    """Everybody who may be there when a server ends."""

    def __init__(self, server, pool):
        url = server.url
        begun = [threading.Event() for _ in range(len(STREAMS) + 1)]
        self.streams = {path: pool.submit(stream, url, path, begun.pop()) for path in STREAMS}
        self.live = pool.submit(watch, server.live_url, begun[0])
        self.plain = pool.submit(post, url, chat())
        self.upload = pool.submit(read_all, raw_post(url, "{", length=1000))
        self.idle = open_socket(url)
        self.idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        self.deaf = raw_post(url, json.dumps(chat(stream=True, n=4)))
        for event in begun:
            assert event.wait(60)
        image = {"type": "image_url", "image_url": {"url": data_url(encoded(plain(4000, 4000)))}}
        self.image = pool.submit(post, url, chat(image))
        time.sleep(0.3)

    def check(self, words):
        """Everybody was told, each in the words of the API that it speaks."""
        for path, future in self.streams.items():
            before_last, last = future.result(5)
            if path in ("/v1/responses", "/v1/messages"):
                assert before_last == "event: error"
                assert json.loads(last.removeprefix("data: "))["type"] == "error"
            else:
                assert last == "data: [DONE]"
                assert "message" in json.loads(before_last.removeprefix("data: "))["error"]
        for future in (self.plain, self.image):
            answer = future.result(5)
            assert (answer.status_code, answer.headers["connection"]) == (503, "close")
            assert words in answer.json()["error"]["message"]
        upload = self.upload.result(5)
        assert upload.startswith(b"HTTP/1.1 503") and words.encode() in upload
        assert read_all(self.idle).startswith(b"HTTP/1.1 200")
        message, code = self.live.result(5)
        assert (message["type"], code) in [("session.closed", 1012), ("session.closed", 1011)]
        self.deaf.close()


@contextmanager
def server_with_clients(tmp_path, *options):
    """Run a server and everybody."""
    with casa_serve(tmp_path / "log.txt", "--enforce-eager", *options) as server, ThreadPoolExecutor(16) as pool:
        started = psutil.Process(server.process.pid).children(recursive=True)
        assert started
        yield server, Clients(server, pool)
        _, alive = psutil.wait_procs(started, timeout=10)
        assert not alive
        assert "nanobind" not in server.log.read_text()


def ended(server, within_s):
    """Wait for the server's end; return the exit status."""
    return server.process.wait(within_s + SLACK_S)


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (signal.SIGTERM, []),
        pytest.param(signal.SIGINT, [], marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, ["--shutdown-timeout", "0"], marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, ["--live-max-sessions", "1"], marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, ["--api-server-count", "2"], marks=pytest.mark.slow),
    ],
)
def test_everybody_is_told_within_the_bound(tmp_path, number, options):
    with server_with_clients(tmp_path, *options) as (server, clients):
        server.process.send_signal(number)
        if "0" not in options:
            time.sleep(0.5)
            late = post(server.url, chat())
            assert (late.status_code, late.headers["connection"]) == (503, "close")
            assert httpx.get(f"{server.url}/health").status_code == 503
            assert httpx.get(f"{server.url}/metrics").status_code == 200
        assert ended(server, TIMEOUT_S) == 0
        clients.check("shutting down")
        message, code = clients.live.result(5)
        assert (message["reason"], code) == ("server is shutting down", 1012)
        assert message["statistics"]["frames"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--api-server-count", "2"]])
def test_everybody_is_told_when_the_engine_dies(tmp_path, options):
    with server_with_clients(tmp_path, *options) as (server, clients):
        server.engine.kill()
        assert ended(server, 3) == 1
        clients.check("The engine has died")


@pytest.mark.slow
def test_what_is_under_way_is_finished_and_a_second_signal_ends_at_once(tmp_path):
    with casa_serve(tmp_path / "log.txt", "--enforce-eager", "--shutdown-timeout", "60") as server:
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=chat(stream=True), timeout=120) as endless:
            next(endless.iter_lines())
            body = chat(stream=True, max_tokens=50)
            with httpx.stream("POST", url, json=body, timeout=120) as short:
                lines = short.iter_lines()
                next(lines)
                server.process.terminate()
                *_, before_last, _, last, _ = lines
            assert last == "data: [DONE]"
            assert json.loads(before_last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
            assert server.process.poll() is None
            started = psutil.Process(server.process.pid).children(recursive=True)
            server.process.terminate()
            assert ended(server, 0) == 128 + signal.SIGTERM
        _, alive = psutil.wait_procs(started, timeout=10)
        assert not alive
        assert "nanobind" not in server.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("after_s", [0.2, 3, 12, 25])
def test_a_server_that_is_not_ready_leaves_at_once(tmp_path, number, after_s):
    command = [CASA_SERVE, "--enforce-eager", "--port", str(free_port())]
    environment = {**os.environ, **ENVIRONMENT}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    time.sleep(after_s)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    # Python itself has no handler yet in its first moments.
    assert process.wait(20) in ((130, -number) if after_s < 1 else (130,))
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
