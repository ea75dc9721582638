"""Which values a replica puts onto Ray's endpoint."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from casa_serving.cluster.replica_metrics import casa_values


def test_counters_and_gauges_of_ours_are_summed_over_labels():
    registry = CollectorRegistry()
    runs = Counter("casa:vision_encoder_runs", "runs", ["engine"], registry=registry)
    runs.labels("0").inc(3)
    runs.labels("1").inc(4)
    Gauge("casa:image_pages_free", "free", registry=registry).set(9)
    Gauge("vllm:other", "not ours", registry=registry).set(1)
    Histogram("casa:delay", "no single value", registry=registry).observe(1)
    assert casa_values(registry) == {"vision_encoder_runs": 7, "image_pages_free": 9}
