"""Exports a replica's own metrics to Ray's Prometheus endpoint.

Ray exports vLLM's metrics (`log_engine_metrics`). CASA's are in the process's
prometheus_client registry (image pages in `casa_vllm.metrics`, live sessions in
`casa_serving.live.metrics`), which Ray does not read. Every series is copied under its
own name, with `:` replaced by `_`.

All of them are gauges to Ray, whatever their type: Ray's counters and histograms accept only single
events, do not exist before the first one, and change the names. Prometheus's `rate` and
`histogram_quantile` do not depend on the type.
"""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.samples import Sample
from ray.util.metrics import Gauge

from casa_vllm.api import LAST_STEP, PREFIX

REPLICA_TAG = "replica"


def name_in_ray(name: str) -> str:
    """Return a metric's name in Ray, whose metrics have no colons."""
    return name.replace(":", "_")


def casa_samples(registry: CollectorRegistry = REGISTRY) -> dict[str, list[Sample]]:
    """Return the current value of every series of CASA's, by the metric's name in Ray."""
    found: dict[str, list[Sample]] = {}
    for metric in registry.collect():
        for sample in metric.samples:
            if sample.name.startswith(PREFIX) and not sample.name.endswith("_created"):
                found.setdefault(name_in_ray(sample.name), []).append(sample)
    return found


def last_step_s(registry: CollectorRegistry = REGISTRY) -> float:
    """Return the Unix time of the engine's last step; 0 before the first."""
    samples = casa_samples(registry).get(name_in_ray(PREFIX + LAST_STEP), [])
    return max((sample.value for sample in samples), default=0.0)


class ReplicaMetrics:
    """Ray's metrics of one replica.

    Args:
        replica: Its name, the label `replica`.
    """

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._gauges: dict[str, Gauge] = {}

    def export(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Copy the current values."""
        for name, samples in casa_samples(registry).items():
            if name not in self._gauges:
                names = (REPLICA_TAG, *samples[0].labels)
                gauge = Gauge(name, description=f"{name} of a replica of CASA's", tag_keys=names)
                self._gauges[name] = gauge.set_default_tags({REPLICA_TAG: self._replica})
            for sample in samples:
                self._gauges[name].set(sample.value, tags=sample.labels)
