"""`casa-serve --ray` on a cluster of somebody else's: whatever fails, nothing is touched that it did not create."""

import os
import signal
import subprocess
import time

import pytest

from other_cluster import other_cluster
from serving_process import CASA_SERVE, ENVIRONMENT, free_port
from waiting import until

# Slow: each test starts a Ray cluster of its own, which takes minutes in all.
pytestmark = [pytest.mark.vllm, pytest.mark.slow]
TIMEOUT_S = 180
# No engine starts in these tests: this fits nowhere, and is waited for.
WAITS = "cpus: 64\ndevice: cpu\nwait_for_nodes: true\nreplicas: {drain_timeout_s: 5}\n"
REFUSED = "cpus: 64\ndevice: cpu\n"


@pytest.fixture(scope="module")
def other():
    """A cluster on which Ray Serve runs."""
    with other_cluster(free_port()) as cluster:
        yield cluster


@pytest.fixture
def tenants(other):
    """Deploy applications of somebody else's by name and route; take away what is left."""

    def deploy(**routes):
        for name, route in routes.items():
            other.do("run", name, route)
        return other.applications()

    yield deploy
    for name in other.applications():
        other.do("delete", name)


@pytest.fixture
def command(other, tmp_path):
    """Start `casa-serve --ray` on that cluster; return the process and its log."""
    running = []

    def start(text, *options, **variables):
        config, log = tmp_path / "cluster.yaml", tmp_path / "log.txt"
        config.write_text(text)
        # Ray gives a cluster a token by itself, and tries it at no address that it is told.
        environment = {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": other.address, "RAY_AUTH_MODE": "token", **variables}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [CASA_SERVE, "--ray", config, *options], env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        running.append(process)
        return process, log

    yield start
    for process in running:
        process.kill()


def said(log):
    """What the command says at its end."""
    return next(line for line in reversed(log.read_text().splitlines()) if line.startswith("casa-serve: "))


def test_what_does_not_fit_leaves_an_application_of_the_same_name(other, tenants, command):
    before = tenants(casa="/other")
    process, log = command(REFUSED)
    assert process.wait(TIMEOUT_S) == 1
    assert "An application 'casa' runs on this cluster already" in said(log)
    assert other.applications() == before


@pytest.mark.parametrize("text", [WAITS, REFUSED])
def test_a_route_that_is_taken_is_refused(other, tenants, command, text):
    before = tenants(mine="/")
    process, log = command(text)
    assert process.wait(TIMEOUT_S) == 1
    assert "The application 'mine' of this cluster is served at / already" in said(log)
    assert other.applications() == before


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (REFUSED, (), "The cluster cannot hold 1 replicas of 64 CPU each"),
        (WAITS, ("--port", "1"), "Ray Serve runs on this cluster already, with proxies at 127.0.0.1:"),
        (WAITS, ("--host", "0.0.0.0"), "Got host 0.0.0.0"),
        ("checkpoint: /nowhere\n", (), "does not exist"),
        ("accelerator_type: NO-SUCH-GPU\ndevice: gpu\nwait_for_nodes: true\n", (), "NO-SUCH-GPU"),
    ],
)
def test_a_refused_command_leaves_the_others(other, tenants, command, text, options, message):
    before = tenants(mine="/mine")
    process, log = command(text, *options)
    assert process.wait(TIMEOUT_S) == 1
    assert message in said(log)
    assert other.applications() == before


def test_a_cluster_does_not_answer_without_its_token(other, tenants, command):
    before = tenants(mine="/mine")
    process, log = command(WAITS, RAY_AUTH_MODE="disabled")
    assert process.wait(TIMEOUT_S) == 1
    assert "No Ray cluster answers at RAY_ADDRESS=" in said(log)
    assert "RAY_AUTH_MODE=token" in said(log)
    assert other.applications() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_takes_away_its_own(other, tenants, command, number):
    before = tenants(mine="/mine")
    process, log = command(WAITS)
    until(lambda: "casa" in other.applications(), TIMEOUT_S)
    process.send_signal(number)
    assert process.wait(TIMEOUT_S) == 130, log.read_text()
    # Ray Serve gives the replica that waits for a node the time of one with requests.
    until(lambda: "casa" not in other.applications(), TIMEOUT_S)
    assert other.applications() == before


@pytest.mark.parametrize("delay_s", [2, 6, 9])
def test_a_command_interrupted_early_leaves_nothing(other, tenants, command, delay_s):
    """Before it has connected, while it checks, while it builds; wherever it is by then."""
    before = tenants(mine="/mine")
    process, log = command(WAITS)
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) in (130, -signal.SIGINT), log.read_text()
    until(lambda: "casa" not in other.applications(), TIMEOUT_S)
    assert other.applications() == before


def test_an_application_that_somebody_else_put_in_its_place_stays(other, tenants, command):
    process, log = command(WAITS)
    until(lambda: "casa" in other.applications(), TIMEOUT_S)
    after = tenants(casa="/")
    assert process.wait(TIMEOUT_S) == 1
    assert "Somebody has deleted or replaced the application 'casa'" in said(log)
    status, route, replicas = other.applications()["casa"]
    assert (status, route, replicas) == ("RUNNING", "/", after["casa"][2])


def test_its_application_deleted_by_somebody_else_ends_it(other, tenants, command):
    before = tenants(mine="/mine")
    process, log = command(WAITS)
    until(lambda: "casa" in other.applications(), TIMEOUT_S)
    other.do("delete", "casa")
    assert process.wait(TIMEOUT_S) == 1
    assert "Somebody has deleted or replaced the application 'casa'" in said(log)
    assert other.applications() == before
