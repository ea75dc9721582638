"""Starts the real `casa-serve` in a process of its own and stops it again."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from openai import OpenAI

CASA_SERVE = Path(sys.executable).parent / "casa-serve"
START_TIMEOUT_S = 480
# Small and quiet: tests share the machine with each other, and look nothing up outside it.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # Engines in the tests' own process say less (vllm_harness.py).
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "NO_PROXY": "*",
    # For servers that send spans.
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    # For middleware that tests put into the server.
    "PYTHONPATH": str(Path(__file__).parent),
}


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: Its address without a path.
        log: File with everything it printed.
        process: The server itself.
    """

    url: str
    log: Path
    process: subprocess.Popen

    def client(self) -> OpenAI:
        """Return OpenAI's own client for it, without retries that would hide an error."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def live_url(self) -> str:
        """Address of the WebSocket of live sessions."""
        return f"{self.url.replace('http', 'ws', 1)}/v1/live"

    @property
    def engine(self) -> psutil.Process:
        """The process of its engine."""
        children = psutil.Process(self.process.pid).children()
        (engine,) = [process for process in children if "EngineCore" in " ".join(process.cmdline())]
        return engine

    def get(self, path: str) -> str:
        """Return the body of a GET request that must succeed."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        """Return a figure of its metrics; 0 where it has none yet."""
        found = re.search(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return float(found[1]) if found else 0.0


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def casa_serve(log: Path, *arguments: str | Path) -> Iterator[Server]:
    """Run `casa-serve` until the body is done; its whole process group ends with it.

    Args:
        log: Where its output goes.
        *arguments: Its command line, without host and port.
    """
    port = free_port()
    with running(log, [CASA_SERVE, *arguments, "--host", "127.0.0.1", "--port", port], port) as server:
        yield server


@contextmanager
def running(log: Path, command: list[str | Path | int], port: int, folder: Path | None = None) -> Iterator[Server]:
    """Run a server until the body is done, as `casa_serve` does.

    Args:
        log: Where its output goes.
        command: Its whole command line.
        port: Where it listens.
        folder: Where it is started; default: here.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        wait_until_healthy(server, process)
        yield server
    finally:
        stop(process)


def wait_until_healthy(server: Server, process: subprocess.Popen) -> None:
    """Wait for `/health`; fail with the end of the log if the server ends or hangs."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            server.get("/health")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-40:])
    raise RuntimeError(f"the server did not start (exit status {process.poll()}):\n{tail}")


def stop(process: subprocess.Popen) -> None:
    """Ask the server to end, then end what is left of its process group."""
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # Everything has ended by itself, as it should.
    process.wait()
