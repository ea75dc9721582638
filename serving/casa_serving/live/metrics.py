"""Statistics of one session, and the server's Prometheus metrics of all sessions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from casa_serving.live.protocol import Delays, Statistics
from casa_serving.live.results import FrameResult
from casa_vllm.api import LABELS, PREFIX

Result = Literal["captioned", "silent", "dropped", "refused"]
# A session may run for days: percentiles are of its last frames, so that memory is bounded.
MAX_DELAYS = 4096
DELAY_BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


class LiveMetrics:
    """The server's Prometheus metrics; one object per process.

    Args:
        labels: Values of `LABELS`, as vLLM's own metrics have them.
        registry: Where they are registered.

    Attributes:
        frames: A counter for each result.
    """

    def __init__(self, labels: Sequence[str], registry: CollectorRegistry = REGISTRY) -> None:
        def metric(kind: type, name: str, text: str, **options: Any) -> Any:
            return kind(f"{PREFIX}live_{name}", text, LABELS, registry=registry, **options).labels(*labels)

        self.sessions = metric(
            Gauge, "sessions", "Open connections to /v1/live that hold one of its places.", multiprocess_mode="livesum"
        )
        by_result = Counter(
            f"{PREFIX}live_frames", "Frames of live sessions by result.", [*LABELS, "result"], registry=registry
        )
        # Made now, so that each series exists, as zero, from the start.
        self.frames = {result: by_result.labels(*labels, result) for result in get_args(Result)}
        self.delay = metric(
            Histogram,
            "frame_delay_seconds",
            "From a frame's arrival to the last token of its caption.",
            buckets=DELAY_BUCKETS_S,
        )
        self.late = metric(
            Counter,
            "late_frames",
            "Frames whose caption took longer than 1/fps, from their arrival to its last token.",
        )
        self.trims = metric(Counter, "trims", "Times a session's text budget was reached.")
        self.restarts = metric(Counter, "restarts", "Engine requests begun again from text.")


@dataclass
class SessionStatistics:
    """Counts of one session, which are added to the server's metrics as well.

    Attributes:
        metrics: The server's.
        frame_interval_ms: 1000/fps: a frame that takes longer is late.
    """

    metrics: LiveMetrics
    frame_interval_ms: float = float("inf")
    counts: dict[Result, int] = field(default_factory=lambda: {"captioned": 0, "silent": 0, "dropped": 0, "refused": 0})
    frames: int = 0
    tokens: int = 0
    questions: int = 0
    late: int = 0
    trims: int = 0
    restarts: int = 0
    started_s: float = field(default_factory=time.monotonic)
    delays_ms: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_DELAYS))
    longest_delay_ms: float | None = None

    def count(self, result: Result) -> None:
        """Count a frame by its result."""
        self.counts[result] += 1
        self.metrics.frames[result].inc()

    def add_frame(self, frame: FrameResult) -> None:
        """Add a captioned or silent frame."""
        self.count("captioned" if frame.caption else "silent")
        self.tokens += frame.num_tokens
        is_late = frame.delay_ms > self.frame_interval_ms
        self.late += is_late
        self.metrics.late.inc(is_late)
        self.delays_ms.append(frame.delay_ms)
        self.longest_delay_ms = max(frame.delay_ms, self.longest_delay_ms or 0.0)
        self.metrics.delay.observe(frame.delay_ms / 1000)
        self.trims += frame.trimmed
        self.metrics.trims.inc(frame.trimmed)
        self.restarts += frame.restarted
        self.metrics.restarts.inc(frame.restarted)

    def summary(self) -> Statistics:
        """Return the statistics for `session.closed`."""
        p50, p95 = (round(float(value), 1) for value in np.percentile(self.delays_ms or [0.0], [50, 95]))
        delays = Delays(p50=p50, p95=p95, max=round(self.longest_delay_ms or 0.0, 2))
        return Statistics(
            frames=self.frames,
            **self.counts,
            tokens=self.tokens,
            questions=self.questions,
            duration_s=round(time.monotonic() - self.started_s, 3),
            late=self.late,
            delay_ms=delays if self.delays_ms else Delays(p50=None, p95=None, max=None),
            trims=self.trims,
            restarts=self.restarts,
        )
