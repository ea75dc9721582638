"""The plugin's interface for `casa_serving`, names in strings included; everything else is private.

Does not import vLLM: a server imports it before it sets vLLM's environment.
"""

from casa_vllm.metric_names import LABELS, LAST_STEP, PREFIX, metric_labels
from casa_vllm.session_kv_budget import PageCosts

# Value for vLLM's option --logits-processors. Model Runner V2 supports none: there the plugin wraps the sampler.
CAPTION_PROCESSOR = "casa_vllm.caption_processor:CaptionLogitsProcessor"

__all__ = ["CAPTION_PROCESSOR", "LABELS", "LAST_STEP", "PREFIX", "PageCosts", "metric_labels"]
