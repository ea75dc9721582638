"""The number of replicas for the current load. Ray Serve applies its own delays and bounds to it.

The load of a CASA replica is its running and queued requests, and its live sessions, whose frames
arrive whether it keeps up or not. Each is compared with its own target, and the larger demand wins,
because a replica can be full in either way. While frames are late although the load is below the
targets, no replica is removed, and one is added unless some replica has no session yet.
"""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

LIVE_SESSIONS = "casa_live_sessions"
# Of the last seconds, see `live.replica_server.FrameWindow`.
LIVE_FRAMES = "casa_live_recent_frames"
LIVE_LATE_FRAMES = "casa_live_recent_late_frames"


class LoadPolicy:
    """Ray Serve's custom autoscaling policy.

    Args:
        target_live_sessions: Live sessions per replica to aim at. The target of requests is Ray
            Serve's own `target_ongoing_requests`.
        target_late_frames: Share of late frames above which there are too few replicas.
    """

    def __init__(self, target_live_sessions: float, target_late_frames: float) -> None:
        self._target_live_sessions = target_live_sessions
        self._target_late_frames = target_late_frames

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Return the target number of replicas, which Ray Serve rounds, and no state."""
        sessions, frames, late = (total(ctx, name) for name in (LIVE_SESSIONS, LIVE_FRAMES, LIVE_LATE_FRAMES))
        # A live session is one of Ray's requests for its whole duration.
        requests = max(0.0, ctx.total_num_requests - sessions)
        wanted = max(requests / ctx.config.get_target_ongoing_requests(), sessions / self._target_live_sessions)
        if frames and late / frames > self._target_late_frames:
            # Sessions do not move: one more replica helps only later ones, and only once every replica has some. With
            # fewer sessions than replicas one more does not help, however late a single session is.
            holding = sum(number > 0 for number in (ctx.aggregated_metrics or {})[LIVE_SESSIONS].values())
            more = holding >= ctx.current_num_replicas
            wanted = max(wanted, min(ctx.current_num_replicas + more, requests + sessions))
        return max(ctx.capacity_adjusted_min_replicas, math.ceil(wanted)), {}


def total(ctx: AutoscalingContext, name: str) -> float:
    """Return the sum of a metric over the replicas; 0 before any has reported it."""
    return sum((ctx.aggregated_metrics or {}).get(name, {}).values())
