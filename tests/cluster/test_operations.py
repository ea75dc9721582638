"""The operations of docs/cluster.md, with its own commands: a cluster with a token, deploy, scale, redeploy, attach.

pytest tests/cluster/test_operations.py     (some minutes: engines start four times)
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml

from serving_process import CASA_SERVE, ENVIRONMENT, free_port
from waiting import until

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text()
START_S = 300
MODEL = "casa-tiny-digits"


def command_of(start):
    """The only command of the page that starts so, without its comment."""
    (line,) = re.findall(rf"^    ({re.escape(start)}.*)$", PAGE, re.MULTILINE)
    return line.split("  #")[0].strip()


def block_of(name):
    """The YAML block of the page that is marked with a name."""
    (text,) = re.findall(rf"^```yaml {name}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return yaml.safe_load(text)


class Cluster:
    """Ray as the page starts it, on ports of its own and with a home of its own, in which there is no token yet."""

    def __init__(self, folder):
        self.folder = folder
        self.port, self.dashboard_port, self.http_port = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.http_port}"
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {
            **kept,
            **ENVIRONMENT,
            "HOME": str(folder),
            "PATH": binaries,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.environment["RAY_DASHBOARD_ADDRESS"] = f"http://127.0.0.1:{self.dashboard_port}"

    def run(self, command, **environment):
        """Run a command of the page; return what it prints."""
        done = subprocess.run(
            ["bash", "-c", command],
            env={**self.environment, **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=START_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start_ray(self):
        """Start the first node, in the foreground so that it can be ended alone."""
        ports = {
            "port": self.port,
            "dashboard-port": self.dashboard_port,
            "ray-client-server-port": free_port(),
            "dashboard-agent-listen-port": free_port(),
            "metrics-export-port": free_port(),
        }
        options = [f"--{name}={value}" for name, value in ports.items()]
        command = [*shlex.split(command_of("ray start --head")), *options, "--num-cpus=2", "--block"]
        with (self.folder / "ray.txt").open("wb") as log:
            self.ray = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def config(self, **args):
        """deploy/cluster.yaml on this cluster's port, without compiling."""
        config = yaml.safe_load((ROOT / "deploy" / "cluster.yaml").read_text())
        config["http_options"] = {"host": "127.0.0.1", "port": self.http_port}
        (application,) = config["applications"]
        application["args"] |= {"engine": {"enforce_eager": True}, **args}
        # Room for one more.
        application["args"]["replicas"] = {"min": 1, "max": 1}
        return config

    def deploy(self, config):
        """Deploy a file with the page's command."""
        path = self.folder / "cluster.yaml"
        path.write_text(yaml.safe_dump(config))
        self.run(command_of("serve deploy deploy/cluster.yaml").replace("deploy/cluster.yaml", str(path)))
        return path

    def details(self):
        """What Ray's dashboard says of the application."""
        headers = {"Authorization": f"Bearer {(self.folder / '.ray' / 'auth_token').read_text()}"}
        address = f"{self.environment['RAY_DASHBOARD_ADDRESS']}/api/serve/applications/"
        return httpx.get(address, headers=headers, timeout=30).json()["applications"].get("casa", {})

    def running(self, deployment):
        """Names of the replicas of a deployment that run."""
        found = self.details().get("deployments", {})
        replicas = next((each["replicas"] for name, each in found.items() if name.startswith(deployment)), [])
        return {replica["replica_id"] for replica in replicas if replica["state"] == "RUNNING"}

    def is_settled(self):
        """Whether the application is as it was asked for."""
        details = self.details()
        healthy = all(each["status"] == "HEALTHY" for each in details.get("deployments", {}).values())
        return details.get("status") == "RUNNING" and healthy


@pytest.fixture(scope="module")
def operated(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("home"))
    name, value = command_of("export RAY_AUTH_MODE").removeprefix("export ").split("=")
    cluster.environment[name] = value
    cluster.run(command_of("ray get-auth-token --generate"))
    cluster.start_ray()
    try:
        until(lambda: "Ray runtime started" in (cluster.folder / "ray.txt").read_text(), START_S)
        yield cluster
    finally:
        cluster.ray.terminate()
        try:
            cluster.ray.wait(60)
        finally:
            try:
                os.killpg(cluster.ray.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


class Traffic:
    """One request a second from a thread, until the context ends."""

    def __init__(self, url):
        self.url, self.outcomes, self._stop = url, [], threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Read."}], "max_tokens": 2}
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self._stop.wait(1):
                try:
                    self.outcomes.append(client.post("/v1/chat/completions", json=body).status_code)
                except httpx.HTTPError as error:
                    self.outcomes.append(repr(error))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def test_deployed_with_a_token(operated):
    operated.deploy(operated.config())
    until(operated.is_settled, START_S)
    assert httpx.get(f"{operated.url}/v1/models", timeout=30).json()["data"][0]["id"] == MODEL
    denied = httpx.get(f"{operated.environment['RAY_DASHBOARD_ADDRESS']}/api/serve/applications/", timeout=30)
    assert denied.status_code == 401


def test_the_override_of_replicas_starts_nothing_anew(operated):
    replicas, ingresses = operated.running("CasaServer"), operated.running("CasaIngress")
    assert (len(replicas), len(ingresses)) == (1, 1)
    config = operated.config()
    config["applications"][0]["deployments"] = block_of("override")["applications"][0]["deployments"]
    with Traffic(operated.url) as traffic:
        operated.deploy(config)
        until(lambda: len(operated.running("CasaServer")) == 2, START_S)
        assert replicas < operated.running("CasaServer")
        # Taken out again: CASA's own scaling goes on, with its own delays.
        operated.deploy(operated.config())
        until(operated.is_settled, START_S)
        time.sleep(5)
    assert replicas & operated.running("CasaServer")
    assert operated.running("CasaIngress") == ingresses
    (model,) = (each for name, each in operated.details()["deployments"].items() if name.startswith("CasaServer"))
    scaling = model["deployment_config"]["autoscaling_config"]
    assert scaling["policy"]["policy_function"] == "casa_serving.cluster.autoscaling:LoadPolicy"
    assert (scaling["upscale_delay_s"], scaling["downscale_delay_s"]) == (5, 60)
    assert set(traffic.outcomes) == {200}


def test_a_changed_configuration_under_traffic_where_there_is_room(operated):
    until(lambda: len(operated.running("CasaServer")) == 1, START_S)
    replicas, ingresses = operated.running("CasaServer"), operated.running("CasaIngress")
    with Traffic(operated.url) as traffic:
        operated.deploy(operated.config(concurrency={"running": 8}))
        until(lambda: replicas.isdisjoint(operated.running("CasaServer") or replicas), START_S)
        until(lambda: ingresses.isdisjoint(operated.running("CasaIngress") or ingresses), START_S)
        time.sleep(5)
    assert len(traffic.outcomes) > 5
    assert set(traffic.outcomes) == {200}


def test_attached_and_away_with_the_command(operated):
    operated.run("serve shutdown -y")
    until(lambda: not operated.details(), START_S)
    path = operated.folder / "cluster.yaml"
    command = command_of("RAY_ADDRESS=FIRST:6379 casa-serve --ray")
    address, _, rest = command.partition(" ")
    assert rest == "casa-serve --ray deploy/cluster.yaml"
    environment = {**operated.environment, "RAY_ADDRESS": f"127.0.0.1:{operated.port}"}
    assert address == "RAY_ADDRESS=FIRST:6379"
    log = operated.folder / "attached.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [CASA_SERVE, "--ray", path], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        until(lambda: process.poll() is not None or "casa-serve: ready at" in log.read_text(), START_S)
        assert process.poll() is None, log.read_text()[-3000:]
        assert httpx.get(f"{operated.url}/v1/models", timeout=30).status_code == 200
        process.terminate()
        assert process.wait(120) == 0
    finally:
        process.kill()
    assert not operated.details()
    assert operated.ray.poll() is None
