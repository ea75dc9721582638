"""How many replicas a load asks for."""

from types import SimpleNamespace

import pytest

from casa_serving.cluster.autoscaling import LIVE_SESSIONS, LoadPolicy


def context(requests=0.0, sessions=(), minimum=1):
    return SimpleNamespace(
        total_num_requests=requests,
        aggregated_metrics={LIVE_SESSIONS: {f"replica {i}": number for i, number in enumerate(sessions)}},
        capacity_adjusted_min_replicas=minimum,
        config=SimpleNamespace(get_target_ongoing_requests=lambda: 8.0),
    )


@pytest.mark.parametrize(
    ("load", "replicas"),
    [
        (context(), 1),
        (context(minimum=2), 2),
        (context(requests=8), 1),
        (context(requests=9), 2),
        (context(requests=40), 5),
        (context(sessions=[4, 1]), 2),
        # Idle sessions hold a replica as much as requests do; the larger demand wins.
        (context(requests=9, sessions=[4, 4, 4]), 3),
    ],
)
def test_the_larger_demand_decides(load, replicas):
    assert LoadPolicy(target_live_sessions=4)(load) == (replicas, {})


def test_no_metrics_yet_is_no_load():
    load = context()
    load.aggregated_metrics = None
    assert LoadPolicy(target_live_sessions=4)(load) == (1, {})
