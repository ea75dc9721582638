"""How many replicas a load asks for. Ray Serve applies its own delays and bounds to the answer.

What loads a CASA replica is the requests it works on, those that wait for it, and the live
sessions it holds, whose frames come on whether it keeps up or not. Each is held against its own
target, and the larger demand wins, because a replica can be full in either way.
"""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

LIVE_SESSIONS = "casa_live_sessions"


class LoadPolicy:
    """Ray Serve's custom autoscaling policy.

    Args:
        target_live_sessions: Live sessions per replica to aim at. The target of requests is Ray
            Serve's own `target_ongoing_requests`.
    """

    def __init__(self, target_live_sessions: float) -> None:
        self._target_live_sessions = target_live_sessions

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Returns the wanted number of replicas, unrounded decisions left to Ray Serve, and no state."""
        sessions = sum((ctx.aggregated_metrics or {}).get(LIVE_SESSIONS, {}).values())
        wanted = max(
            ctx.total_num_requests / ctx.config.get_target_ongoing_requests(),
            sessions / self._target_live_sessions,
        )
        return max(ctx.capacity_adjusted_min_replicas, math.ceil(wanted)), {}
