"""Which values a replica puts onto Ray's endpoint."""

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from casa_serving.cluster import replica_metrics
from casa_serving.cluster.replica_metrics import ReplicaMetrics, casa_samples

pytestmark = pytest.mark.unit


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
    found = {
        (name, *sample.labels.values()): sample.value
        for name, samples in casa_samples(registry).items()
        for sample in samples
    }
    assert found == {
        ("casa_frames_total", "captioned"): 3,
        ("casa_frames_total", "silent"): 4,
        ("casa_image_pages_free",): 9,
        ("casa_delay_bucket", "1.0"): 0,
        ("casa_delay_bucket", "2.0"): 1,
        ("casa_delay_bucket", "+Inf"): 1,
        ("casa_delay_count",): 1,
        ("casa_delay_sum",): 1.5,
    }


class RecordedGauge:
    """Stands where Ray's gauge would be, which cannot be read back in the process that writes it."""

    def __init__(self, name, description, tag_keys):
        self.tag_keys, self.calls = tag_keys, []

    def set_default_tags(self, tags):
        assert tags == {"replica": "r"}
        return self

    def set(self, value, tags):
        assert {"replica", *tags} == {*self.tag_keys}
        self.calls.append(value)


def test_the_present_values_are_told_each_time(registry, monkeypatch):
    monkeypatch.setattr(replica_metrics, "Gauge", RecordedGauge)
    metrics = ReplicaMetrics("r")
    metrics.export(registry)
    metrics.export(registry)
    assert metrics._gauges["casa_frames_total"].calls == [3, 4, 3, 4]
    assert metrics._gauges["casa_image_pages_free"].calls == [9, 9]
