"""A Ray cluster on this machine with the application on it: what the benchmarks of the cluster share.

The nodes are processes of this machine (`ray.cluster_utils.Cluster`), which Ray takes for machines: each has its own
scheduler, resources and metrics endpoint. The application is deployed as `casa-serve --ray` does it, from this
process, which can therefore ask Ray Serve about its replicas and change the configuration.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image

from casa_serving.cluster import launch
from casa_serving.cluster.address import check_port
from casa_serving.cluster.warmup import warm_up

HOST = "127.0.0.1"
# Ray reserves a third of the memory for each node otherwise; nothing here passes objects.
OBJECT_STORE_BYTES = 200_000_000
START_S = 600.0
SAMPLE_S = 0.5
# Characters of an error that are kept.
DETAIL = 300


@dataclass(frozen=True)
class Replica:
    """One replica as Ray Serve sees it.

    Attributes:
        name: What answers carry in `x-casa-replica`.
        state: Ray Serve's word, such as STARTING, RUNNING or STOPPING.
        pid: Of its actor's process; None before there is one.
        node: Ray's id of its node; None before it has one.
    """

    name: str
    state: str
    pid: int | None
    node: str | None


class LocalCluster:
    """A context in which the application runs.

    Args:
        config: The cluster configuration (docs/cluster.md) as a mapping, deployed as `casa-serve --ray` does; or a
            Serve config file with it, as `serve deploy` does.
        num_nodes: Nodes, each with `cpus_per_node` logical CPUs.
        cpus_per_node: What Ray hands out; replicas take `cpus` of it.
        port: Of the HTTP proxy, which runs on the head node alone.
    """

    def __init__(
        self, config: dict[str, Any], *, num_nodes: int = 1, cpus_per_node: float = 2, port: int = 8123
    ) -> None:
        self._config = config
        self._num_nodes = num_nodes
        self._cpus_per_node = cpus_per_node
        self._port = port
        self.url = f"http://{HOST}:{port}"
        self.ready_s = 0.0

    def __enter__(self) -> LocalCluster:
        # Before Ray is imported, whose modules read their environment once.
        launch.set_environment()
        import ray
        from ray import serve
        from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
        from ray.cluster_utils import Cluster

        check_port(HOST, self._port)
        started = time.monotonic()
        # ray.init() does this where it starts a cluster itself.
        ensure_token_if_auth_enabled(None, create_token_if_missing=True)
        node = {"num_cpus": self._cpus_per_node, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=node)
        try:
            for _ in range(self._num_nodes - 1):
                self._cluster.add_node(num_cpus=self._cpus_per_node, object_store_memory=OBJECT_STORE_BYTES)
            ray.init(self._cluster.address, log_to_driver=False, logging_level=logging.WARNING)
            serve.start(proxy_location="HeadOnly", http_options={"host": HOST, "port": self._port})
            if "applications" in self._config:
                self.apply(self._config)
                self.wait_until(lambda replicas: any(replica.state == "RUNNING" for replica in replicas))
            else:
                self.deploy(self._config)
            warm_up(self.url)
        except BaseException:
            self.__exit__()
            raise
        self.ready_s = time.monotonic() - started
        return self

    def __exit__(self, *_: object) -> None:
        import ray
        from ray import serve

        try:
            if ray.is_initialized():
                serve.shutdown()
                ray.shutdown()
        finally:
            self._cluster.shutdown()

    def deploy(self, config: dict[str, Any]) -> None:
        """Deploy a configuration and wait until it is healthy; what did not change goes on running."""
        from ray import serve

        from casa_serving.cluster import build_app

        serve.run(build_app(config), name=launch.APPLICATION, route_prefix="/")

    def apply(self, config: dict[str, Any]) -> None:
        """Deploy a Serve config file as Ray's dashboard does for `serve deploy`; do not wait."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)

    def replicas(self) -> list[Replica]:
        """Return the replicas of the model, those that come and go included."""
        return self._replicas_of("CasaServer")

    def ingresses(self) -> list[Replica]:
        """Return the ingresses, those that come and go included."""
        return self._replicas_of("CasaIngress")

    def _replicas_of(self, deployment: str) -> list[Replica]:
        from ray.serve.context import _get_global_client

        application = _get_global_client().get_serve_details()["applications"].get(launch.APPLICATION, {})
        found = (some for name, some in application.get("deployments", {}).items() if name.startswith(deployment))
        # There is none until the application is built.
        model = next(found, {"replicas": []})
        # Ray Serve leaves out what a replica does not have yet.
        return [
            Replica(
                each["replica_id"],
                str(getattr(each["state"], "value", each["state"])),
                each.get("pid"),
                each.get("node_id"),
            )
            for each in model["replicas"]
        ]

    def running(self) -> list[Replica]:
        """Return the replicas that take requests."""
        return [replica for replica in self.replicas() if replica.state == "RUNNING"]

    def wait_until(self, reached: Callable[[list[Replica]], bool], timeout_s: float = START_S) -> float:
        """Wait until the replicas are as wanted; return how long that took.

        Raises:
            TimeoutError: With the replicas there are.
        """
        started = time.monotonic()
        while not reached(replicas := self.replicas()):
            if time.monotonic() - started > timeout_s:
                raise TimeoutError(f"After {timeout_s:g} s the replicas are {replicas}.")
            time.sleep(SAMPLE_S)
        return time.monotonic() - started

    def metrics(self) -> str:
        """Return the text of all nodes' Prometheus endpoints."""
        import ray

        ports = [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]]
        return "\n".join(httpx.get(f"http://{HOST}:{port}/metrics", timeout=30).text for port in ports)


class Sampler:
    """Notes every half second what a function returns, from a thread, until the context ends.

    Attributes:
        samples: Seconds since `started` and the value.
    """

    def __init__(self, read: Callable[[], Any], started: float) -> None:
        self.samples: list[tuple[float, Any]] = []
        self._read = read
        self._started = started
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            value = self._read()
            self.samples.append((time.monotonic() - self._started, value))


@dataclass(frozen=True)
class Outcome:
    """How one request ended; times by the monotonic clock.

    Attributes:
        kind: "answered" is the only good one of a request that is not streamed; a stream is "whole", or it ends with
            an "error event" and [DONE].
        headers: Of the answer; empty if there was none.
        detail: The message of an error.
    """

    streamed: bool
    started: float
    ended: float
    kind: str
    headers: Mapping[str, str]
    detail: str = ""

    @property
    def good(self) -> bool:
        """Whether the client got all that it asked for."""
        return self.kind in ("answered", "whole")

    @property
    def seconds(self) -> float:
        """How long it took, to the last byte."""
        return self.ended - self.started

    @property
    def replica(self) -> str:
        """The replica that answered; "" if none did."""
        return self.headers.get("x-casa-replica", "")


async def ask(client: httpx.AsyncClient, body: dict[str, Any], **headers: str) -> Outcome:
    """Send a chat request and return how it ended."""
    started = time.monotonic()
    streamed = body.get("stream", False)
    got: Mapping[str, str] = {}
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            got = answer.headers
            text = (await answer.aread()).decode()
        kind, detail = outcome_kind(answer.status_code, text, streamed)
    except httpx.HTTPError as error:
        kind, detail = "connection lost", repr(error)[:DETAIL]
    return Outcome(streamed, started, time.monotonic(), kind, got, detail)


def outcome_kind(status: int, text: str, streamed: bool) -> tuple[str, str]:
    """Return kind and detail of an answer that ended by itself."""
    if status != 200:
        return f"status {status}", text[:DETAIL]
    if not streamed:
        whole = json.loads(text)["choices"][0]["finish_reason"]
        return ("answered", "") if whole else ("unfinished", text[:DETAIL])
    lines = [line for line in text.splitlines() if line]
    if not lines or lines[-1] != "data: [DONE]":
        return "cut off", " ".join(lines[-2:])[:DETAIL]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    errors = [event["error"] for event in events if "error" in event]
    if errors:
        return "error event", json.dumps(errors[0])[:DETAIL]
    finished = any(choice.get("finish_reason") for event in events for choice in event.get("choices", ()))
    return ("whole", "") if finished else ("unfinished", lines[-2][:DETAIL])


def noise_url(seed: int, side: int = 320) -> str:
    """Return a data URL of an image of nothing but noise; about 410 kB at 320 x 320."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def chat_body(model: str, text: str, *images: str, **options: Any) -> dict[str, Any]:
    """Return the body of a chat request; `options` are its other fields."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    return {"model": model, "messages": [message], "temperature": 0, **options}


def model_name(url: str) -> str:
    """Return the name of the served model."""
    return httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile; the median for 50. NaN of nothing."""
    return float(np.percentile(values, percent)) if values else float("nan")


def summary_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return number, p50, p95 and the largest of some times, in ms."""
    if not seconds:
        return {"number": 0}
    return {
        "number": len(seconds),
        "p50_ms": round(1000 * statistics.median(seconds), 1),
        "p95_ms": round(1000 * percentile(seconds, 95), 1),
        "max_ms": round(1000 * max(seconds), 1),
    }
