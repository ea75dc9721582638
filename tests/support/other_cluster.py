"""A Ray cluster of somebody else's, in a process of its own, with small applications that are no engines.

Run as a script it starts Ray and does what it reads, one JSON command a line; `other_cluster` runs
that script and is its client. Ray connects a process to one cluster, and tests' own process may have another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class OtherCluster:
    """A client of the script.

    Attributes:
        address: For RAY_ADDRESS.
        http_port: Of Serve's proxies.
        process: The script's.
    """

    address: str
    http_port: int
    process: subprocess.Popen

    def do(self, command: str, *arguments: Any) -> Any:
        """Have the script do something; return its answer."""
        self.process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def applications(self) -> dict[str, list[Any]]:
        """Return status and route of each application, and how often its replica was started, by name."""
        return self.do("applications")


@contextmanager
def other_cluster(http_port: int, num_cpus: int = 2) -> Iterator[OtherCluster]:
    """Run a cluster until the body is done.

    Args:
        http_port: For Serve's proxies.
        num_cpus: Of the node.
    """
    command = [sys.executable, __file__, str(http_port), str(num_cpus)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    try:
        yield OtherCluster(json.loads(process.stdout.readline()), http_port, process)
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        finally:
            process.kill()


def main() -> None:
    """Do what is read from standard input, until it ends."""
    # What Ray prints must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client

    http_port, num_cpus = map(int, sys.argv[1:])

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Hello:
        def __init__(self) -> None:
            self.pid = os.getpid()

        def __call__(self) -> str:
            return str(self.pid)

    def applications() -> dict[str, list[Any]]:
        found = _get_global_client().get_serve_details()["applications"]
        return {
            name: [
                details["status"],
                details["route_prefix"],
                sorted(
                    replica["replica_id"] for each in details["deployments"].values() for replica in each["replicas"]
                ),
            ]
            for name, details in found.items()
        }

    def run(name: str, route: str) -> bool:
        serve.run(Hello.bind(), name=name, route_prefix=route)
        return True

    def delete(name: str) -> bool:
        serve.delete(name)
        return True

    commands = {"applications": applications, "run": run, "delete": delete}
    context = ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": http_port})
        send(answers, context.address_info["address"])
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            send(answers, commands[command](*arguments))
    finally:
        serve.shutdown()
        ray.shutdown()


def send(answers: Any, value: Any) -> None:
    """Write an answer."""
    answers.write(json.dumps(value, default=str) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
