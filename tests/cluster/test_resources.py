"""Whether nodes can hold replicas, and what is said when they cannot."""

import pytest

from casa_engine.errors import InputError
from casa_serving.cluster import resources

pytestmark = pytest.mark.unit

NODES = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0}]


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of two nodes as Ray describes it; a third has died."""
    nodes = [{"Alive": True, "Resources": node} for node in NODES]
    monkeypatch.setattr(resources.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(resources.ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 99.0}}])


@pytest.mark.parametrize(
    ("worker", "num_workers", "replicas"),
    [({"CPU": 1}, 1, 6), ({"CPU": 2}, 2, 1), ({"CPU": 0.5}, 1, 12), ({"CPU": 1, "GPU": 1}, 1, 1)],
)
def test_what_fits_is_taken(cluster, worker, num_workers, replicas):
    resources.check_capacity(worker, num_workers, replicas)


@pytest.mark.parametrize(
    ("worker", "num_workers", "replicas"),
    [({"CPU": 1}, 1, 7), ({"CPU": 3}, 2, 1), ({"CPU": 1, "GPU": 1}, 2, 1), ({"CPU": 1, "GPU": 1}, 1, 2)],
)
def test_what_does_not_fit_is_refused_with_numbers(cluster, worker, num_workers, replicas):
    with pytest.raises(InputError, match=r"cannot hold .* its nodes have 4 CPU.*, 2 CPU"):
        resources.check_capacity(worker, num_workers, replicas)


@pytest.mark.parametrize(
    ("worker", "num_workers", "fitting"), [({"CPU": 1}, 1, 6), ({"CPU": 2}, 2, 1), ({"GPU": 1}, 2, 0)]
)
def test_replicas_that_fit_are_counted(cluster, worker, num_workers, fitting):
    assert resources.count_fitting(worker, num_workers) == fitting


def test_nothing_fits_where_no_cluster_runs(monkeypatch):
    monkeypatch.setattr(resources.ray, "is_initialized", lambda: False)
    assert resources.count_fitting({"CPU": 1}, 1) == 0
