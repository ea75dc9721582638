"""How many replicas a load asks for."""

import inspect

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from casa_serving.cluster.autoscaling import LIVE_FRAMES, LIVE_LATE_FRAMES, LIVE_SESSIONS, LoadPolicy

pytestmark = pytest.mark.unit

POLICY = LoadPolicy(target_live_sessions=4, target_late_frames=0.1)


def context(requests=0.0, sessions=(), minimum=1, frames=(), late=(), running=1):
    """What Ray Serve tells a policy, in its own class; it counts live sessions among its requests."""

    def by_replica(values):
        return {f"replica {i}": number for i, number in enumerate(values)}

    own = {
        "total_num_requests": requests + sum(sessions),
        "aggregated_metrics": {
            LIVE_SESSIONS: by_replica(sessions),
            LIVE_FRAMES: by_replica(frames),
            LIVE_LATE_FRAMES: by_replica(late),
        },
        "capacity_adjusted_min_replicas": minimum,
        "current_num_replicas": running,
        "config": AutoscalingConfig(target_ongoing_requests=8.0),
    }
    return AutoscalingContext(**dict.fromkeys(inspect.signature(AutoscalingContext).parameters) | own)


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
        # Sessions are not counted a second time as requests.
        (context(requests=8, sessions=[4]), 1),
    ],
)
def test_the_larger_demand_decides(load, replicas):
    assert POLICY(load) == (replicas, {})


@pytest.mark.parametrize(
    ("load", "replicas"),
    [
        (context(sessions=[3], frames=[60], late=[6]), 1),
        (context(sessions=[3], frames=[60], late=[7]), 2),
        (context(sessions=[3, 3], frames=[60, 60], late=[12, 1], running=2), 3),
        # One more than run, not than are on their way already.
        (context(sessions=[3], frames=[60], late=[60], minimum=2), 2),
        # A session that is late all by itself is no better off beside an empty replica.
        (context(sessions=[1], frames=[20], late=[20]), 1),
        (context(sessions=[1, 1], frames=[20, 20], late=[20, 20], running=2), 2),
        (context(requests=1, sessions=[1], frames=[20], late=[20]), 2),
        (context(sessions=[3], frames=[0], late=[0]), 1),
        # The next sessions go to the empty replica; until then it is kept.
        (context(sessions=[3, 0], frames=[60, 0], late=[20, 0], running=2), 2),
    ],
)
def test_late_frames_ask_for_one_replica_more(load, replicas):
    assert POLICY(load) == (replicas, {})


def test_no_metrics_yet_is_no_load():
    load = context()
    load.aggregated_metrics = None
    assert POLICY(load) == (1, {})
