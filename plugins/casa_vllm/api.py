"""What `casa_serving` may use of the plugin, names in strings included; everything else is the plugin's own.

Importing it imports no vLLM: a server reads it before it sets vLLM's environment.
"""

from casa_vllm.metric_names import LAST_STEP, PREFIX
from casa_vllm.session_kv_budget import PageCosts

# As vLLM's option --logits-processors takes it. Model Runner V2 takes none: there the plugin wraps the sampler.
CAPTION_PROCESSOR = "casa_vllm.caption_processor:CaptionLogitsProcessor"

__all__ = ["CAPTION_PROCESSOR", "LAST_STEP", "PREFIX", "PageCosts"]
