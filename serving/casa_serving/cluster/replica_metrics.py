"""Puts a replica's own counters onto Ray's Prometheus endpoint.

vLLM's metrics go there by themselves (`log_engine_metrics`). CASA's counters of image pages are
kept in the process's prometheus_client registry (`casa_vllm.metrics`), which nobody reads in a
replica; their values are copied to gauges of the same names, with `:` turned into `_`.
"""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry
from ray.util.metrics import Gauge

PREFIX = "casa:"


def casa_values(registry: CollectorRegistry = REGISTRY) -> dict[str, float]:
    """Returns the sums over labels of every counter and gauge of CASA's, by name without the prefix."""
    values: dict[str, float] = {}
    for metric in registry.collect():
        if metric.name.startswith(PREFIX) and metric.type in ("counter", "gauge"):
            samples = [sample.value for sample in metric.samples if not sample.name.endswith("_created")]
            values[metric.name.removeprefix(PREFIX)] = sum(samples)
    return values


class ReplicaMetrics:
    """The gauges of one replica.

    Args:
        replica: Its name, the label `replica`.
    """

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._gauges: dict[str, Gauge] = {}

    def export(self) -> None:
        """Copies the present values."""
        for name, value in casa_values().items():
            if name not in self._gauges:
                gauge = Gauge(f"casa_{name}", description=f"{PREFIX}{name} of a replica", tag_keys=("replica",))
                self._gauges[name] = gauge.set_default_tags({"replica": self._replica})
            self._gauges[name].set(value)
