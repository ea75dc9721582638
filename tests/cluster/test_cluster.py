"""The application on a real cluster of two nodes."""

import pytest

pytestmark = pytest.mark.vllm


def test_each_node_has_a_replica(cluster):
    replicas = cluster.replicas()
    assert len(replicas) == 2
    assert len({replica["node_id"] for replica in replicas.values()}) == 2
