"""Puts a replica's own counters onto Ray's Prometheus endpoint.

vLLM's metrics go there by themselves (`log_engine_metrics`). CASA's are kept in the process's
prometheus_client registry (image pages in `casa_vllm.metrics`, live sessions in
`casa_serving.live.statistics`), which nobody reads in a replica. They are copied under the same
names, with `:` turned into `_`. Ray's histograms take observations, not buckets, so a histogram
becomes counters: `..._bucket` with its label `le`, `..._sum` and `..._count`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry
from ray.util.metrics import Counter, Gauge

PREFIX = "casa:"
REPLICA_TAG = "replica"


@dataclass(frozen=True)
class Value:
    """One series of the registry.

    Attributes:
        name: Ray's name of the metric; Ray appends `_total` to counters itself.
        is_counter: Whether it only grows.
        labels: Its labels and their values.
        value: Its present value.
        text: What the metric is, for its description.
    """

    name: str
    is_counter: bool
    labels: tuple[tuple[str, str], ...]
    value: float
    text: str


def casa_values(registry: CollectorRegistry = REGISTRY) -> Iterator[Value]:
    """Yields every series of CASA's."""
    for metric in registry.collect():
        if not metric.name.startswith(PREFIX):
            continue
        for sample in metric.samples:
            if sample.name.endswith("_created"):
                continue
            name = sample.name.replace(":", "_").removesuffix("_total")
            labels = tuple(sorted(sample.labels.items()))
            yield Value(name, metric.type != "gauge", labels, sample.value, metric.documentation)


class ReplicaMetrics:
    """Ray's metrics of one replica.

    Args:
        replica: Its name, the label `replica`.
    """

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._metrics: dict[str, Counter | Gauge] = {}
        self._told: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def export(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Copies the present values."""
        for value in casa_values(registry):
            metric = self._metrics.get(value.name) or self._add(value)
            tags = dict(value.labels)
            if isinstance(metric, Gauge):
                metric.set(value.value, tags=tags)
            else:
                self._count(metric, value, tags)

    def _add(self, value: Value) -> Counter | Gauge:
        kind = Counter if value.is_counter else Gauge
        names = (REPLICA_TAG, *(name for name, _ in value.labels))
        metric = kind(value.name, description=value.text, tag_keys=names)
        metric.set_default_tags({REPLICA_TAG: self._replica})
        self._metrics[value.name] = metric
        return metric

    def _count(self, metric: Counter, value: Value, tags: dict[str, str]) -> None:
        """Adds what was added since the last time: Ray's counters take differences, and none of zero."""
        series = (value.name, value.labels)
        grown = value.value - self._told.get(series, 0.0)
        if grown > 0:
            metric.inc(grown, tags=tags)
            self._told[series] = value.value
