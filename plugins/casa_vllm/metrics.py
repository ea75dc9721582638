"""Prometheus metrics of image pages and vision-encoder runs.

The scheduler counts in the engine process; the server's /metrics is in another, see `engine_counters`.
`ImageStatLogger` exports them there; vLLM loads it through the entry point group `vllm.stat_logger_plugins`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from casa_engine.configuration import CasaConfig
from casa_vllm.engine_counters import EngineCountersReader, shared_folder
from casa_vllm.metric_names import COUNTERS, GAUGES, LABELS, LAST_STEP, LAST_STEP_TEXT, PREFIX, metric_labels

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from casa_vllm.image_manager import ImageCounters


def image_stats(groups: Sequence["ImageCounters"], num_free_pages: int) -> dict[str, int]:
    """Return the counters of all image groups together, by name."""
    return {
        "image_pages_in_use": sum(group.pages_in_use for group in groups),
        "image_pages_free": num_free_pages,
        "image_pages_shared": sum(group.pages_shared for group in groups),
        "image_pages_released": sum(group.pages_released for group in groups),
        # Every group has pages of the same images.
        "vision_encoder_runs": max((group.images_encoded for group in groups), default=0),
        "vision_encoder_runs_saved": min((group.images_reused for group in groups), default=0),
    }


class ImageStatLogger(StatLoggerBase):
    """Exports one engine's image counters, none for models that are not CASA's, and the time of its last step."""

    def __init__(self, vllm_config: "VllmConfig", engine_index: int = 0) -> None:
        self._labels = metric_labels(vllm_config)
        self._last: dict[str, int] = {}
        self._gauges = {
            name: _metric(Gauge, name, text, multiprocess_mode="mostrecent") for name, text in GAUGES.items()
        }
        self._last_step = _metric(Gauge, LAST_STEP, LAST_STEP_TEXT, multiprocess_mode="mostrecent")
        self._last_step.labels(*self._labels).set_to_current_time()
        self._counters = {name: _metric(Counter, name, text) for name, text in COUNTERS.items()}
        config = vllm_config.model_config.hf_config
        has_counters = isinstance(config, CasaConfig) and config.is_cross_attention and shared_folder() is None
        self._reader = EngineCountersReader(vllm_config) if has_counters else None

    def read(self) -> dict[str, int]:
        """Return the engine's counters by name; none that are not exported here."""
        return {} if self._reader is None else self._reader.read()

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM after every step with new stats."""
        if scheduler_stats is None:
            return
        self._last_step.labels(*self._labels).set_to_current_time()
        values = self.read()
        for name in self._gauges.keys() & values.keys():
            self._gauges[name].labels(*self._labels).set(values[name])
        for name in self._counters.keys() & values.keys():
            self._counters[name].labels(*self._labels).inc(values[name] - self._last.get(name, 0))
        self._last = values

    def log_engine_initialized(self) -> None:
        """No-op: required by vLLM's interface."""


def _metric(kind: type, name: str, text: str, **options: str) -> Any:
    """Return this process's metric of that name; create it if necessary."""
    for collector, names in list(REGISTRY._collector_to_names.items()):
        if PREFIX + name in names:
            return collector
    return kind(PREFIX + name, text, LABELS, **options)
