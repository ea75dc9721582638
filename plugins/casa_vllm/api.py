"""The plugin's interface for `casa_serving`, names in strings included; everything else is private.

Importing it does not import vLLM: a server does so before it sets vLLM's environment.
"""

from casa_vllm.metric_names import LABELS, LAST_STEP, PREFIX, metric_labels
from casa_vllm.session_kv_budget import PageCosts

# Value for vLLM's option --logits-processors. Model Runner V2 supports none: there the plugin wraps the sampler.
CAPTION_PROCESSOR = "casa_vllm.caption_processor:CaptionLogitsProcessor"

__all__ = [
    "CAPTION_PROCESSOR",
    "LABELS",
    "LAST_STEP",
    "PREFIX",
    "PageCosts",
    "import_cpu_engine",
    "metric_labels",
]


def import_cpu_engine() -> None:
    """Import what an engine's process on a CPU will need: seconds, which nothing else has to wait for."""
    import vllm.v1.engine.core
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.structured_output.backend_xgrammar
    import vllm.v1.worker.cpu_worker  # noqa: F401

    import casa_vllm.caption_processor
    import casa_vllm.model
    import casa_vllm.scheduler
    import casa_vllm.v1_runner  # noqa: F401
