"""One real cluster of two nodes on this machine, with the embedded model on both."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import ray
from openai import OpenAI
from ray import serve
from ray.cluster_utils import Cluster

from casa_serving.cluster import build_app
from casa_serving.cluster.launch import APPLICATION, set_environment
from casa_serving.cluster.warmup import warm_up
from serving_process import free_port
from waiting import until

# One replica fits on each node.
CONFIG: dict[str, Any] = {
    "device": "cpu",
    "cpus": 1,
    "replicas": {"min": 2, "max": 2, "drain_timeout_s": 20},
    "concurrency": {"running": 4, "waiting": 1, "queued": 8},
    # Compiling would take longer than all the tests.
    "engine": {"enforce_eager": True},
}
# Of what nodes report, in milliseconds: 10 s by default, for which each test of metrics would wait.
METRICS_INTERVAL = "RAY_metrics_report_interval_ms"
AGENT_START_S = 120


@dataclass
class RunningCluster:
    """The application on its cluster.

    Attributes:
        url: Its HTTP address without a path.
        metrics_urls: The Prometheus endpoint of each node.
        config: The configuration that is deployed.
    """

    url: str
    metrics_urls: list[str]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def live_url(self) -> str:
        """Address of the WebSocket of live sessions."""
        return f"{self.url.replace('http', 'ws', 1)}/v1/live"

    def deploy(self, config: dict[str, Any]) -> None:
        """Deploy a configuration and wait until it is ready; replicas that stay are not started again."""
        serve.run(build_app(config), name=APPLICATION, route_prefix="/")
        self.config = config

    def delete(self) -> None:
        """Delete the application; Ray Serve stays."""
        serve.delete(APPLICATION)
        self.config = {}

    def client(self) -> OpenAI:
        """Return OpenAI's own client, without retries that would hide an error."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def metrics(self) -> str:
        """Return what both nodes tell Prometheus."""
        return "\n".join(httpx.get(url, timeout=10).text for url in self.metrics_urls)

    def replicas(self) -> dict[str, Any]:
        """Return Serve's details of the replicas that run, by their name."""
        from ray.serve.context import _get_global_client

        details = _get_global_client().get_serve_details()["applications"][APPLICATION]["deployments"]
        found = next(deployment for name, deployment in details.items() if name.startswith("CasaServer"))
        return {
            replica["replica_id"]: replica for replica in found["replicas"] if str(replica["state"]).endswith("RUNNING")
        }


def is_answered(url: str) -> bool:
    """Return whether somebody answers at an address by now."""
    try:
        return httpx.get(url, timeout=10).is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="package")
def cluster() -> Iterator[RunningCluster]:
    """The embedded model on two nodes, each of them with a replica and an HTTP proxy on the same port."""
    set_environment()
    os.environ.pop("RAY_ADDRESS", None)
    ports = [free_port(), free_port()]
    nodes = Cluster()
    os.environ[METRICS_INTERVAL] = "1000"
    try:
        for port in ports:
            nodes.add_node(num_cpus=1, include_dashboard=False, metrics_export_port=port)
        ray.init(address=nodes.address, log_to_driver=False)
        http_port = free_port()
        metrics_urls = [f"http://127.0.0.1:{port}/metrics" for port in ports]
        running = RunningCluster(f"http://127.0.0.1:{http_port}", metrics_urls)
        # A process that starts long before its node's agent does gives up telling it metrics, for good.
        until(lambda: all(map(is_answered, metrics_urls)), AGENT_START_S)
        serve.start(http_options={"host": "127.0.0.1", "port": http_port})
        running.deploy(CONFIG)
        warm_up(running.url)
        yield running
    finally:
        serve.shutdown()
        ray.shutdown()
        nodes.shutdown()
        del os.environ[METRICS_INTERVAL]
