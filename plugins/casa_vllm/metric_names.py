"""Names, labels and meanings of the metrics that the plugin exports; needs no vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "casa:"
LABELS = ("model_name", "engine")
GAUGES = {
    "image_pages_in_use": "Image pages that running requests read or are about to read.",
    "image_pages_free": "Cache pages that can be taken (shared with text).",
}
COUNTERS = {
    "image_pages_shared": "Image pages found in the cache instead of being written.",
    "image_pages_released": "Image pages given back because their window had passed.",
    "vision_encoder_runs": "Images that the vision encoder encoded.",
    "vision_encoder_runs_saved": "Images whose pages were found, so that no encoding was needed.",
}
LAST_STEP = "last_step_timestamp_seconds"
LAST_STEP_TEXT = "Unix time of the engine's last step: now while it works, older while it has nothing to do."


def metric_labels(vllm_config: VllmConfig) -> list[str]:
    """Return the values of `LABELS`; a server has one engine, as the configuration hook rejects data parallelism."""
    return [str(vllm_config.model_config.served_model_name), "0"]
