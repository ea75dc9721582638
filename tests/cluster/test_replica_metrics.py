"""Which values a replica puts onto Ray's endpoint."""

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from casa_serving.cluster import replica_metrics
from casa_serving.cluster.replica_metrics import ReplicaMetrics, casa_values


@pytest.fixture
def registry():
    """A registry with one metric of each kind, and one that is not ours."""
    registry = CollectorRegistry()
    frames = Counter("casa:frames", "frames", ["result"], registry=registry)
    frames.labels("captioned").inc(3)
    frames.labels("silent").inc(4)
    Gauge("casa:image_pages_free", "free", registry=registry).set(9)
    Gauge("vllm:other", "not ours", registry=registry).set(1)
    Histogram("casa:delay", "delay", buckets=(1, 2), registry=registry).observe(1.5)
    return registry


def test_every_series_of_ours_is_there_with_its_labels(registry):
    found = {(value.name, value.labels): value.value for value in casa_values(registry)}
    assert found == {
        ("casa_frames", (("result", "captioned"),)): 3,
        ("casa_frames", (("result", "silent"),)): 4,
        ("casa_image_pages_free", ()): 9,
        ("casa_delay_bucket", (("le", "1.0"),)): 0,
        ("casa_delay_bucket", (("le", "2.0"),)): 1,
        ("casa_delay_bucket", (("le", "+Inf"),)): 1,
        ("casa_delay_count", ()): 1,
        ("casa_delay_sum", ()): 1.5,
    }


class Recorded:
    """Stands where Ray's metric would be, which cannot be read back in the process that writes it."""

    def __init__(self, name, description, tag_keys):
        assert "replica" in tag_keys
        self.calls = []

    def set_default_tags(self, tags):
        assert tags == {"replica": "r"}

    def inc(self, amount, tags):
        self.calls.append((amount, tags))


class RecordedGauge(Recorded):
    def set(self, amount, tags):
        self.calls.append((amount, tags))


def test_counters_are_told_what_was_added(registry, monkeypatch):
    monkeypatch.setattr(replica_metrics, "Counter", Recorded)
    monkeypatch.setattr(replica_metrics, "Gauge", RecordedGauge)
    metrics = ReplicaMetrics("r")
    metrics.export(registry)
    metrics.export(registry)
    counter = metrics._metrics["casa_frames"]
    assert sorted(amount for amount, _ in counter.calls) == [3, 4]
    assert metrics._metrics["casa_image_pages_free"].calls == [(9, {}), (9, {})]
