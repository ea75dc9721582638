"""How many text tokens the KV cache holds, which vLLM's own line of the log does not say for CASA.

vLLM divides the pages by the most that one request may ever need. For images that is every step in flight with as many
image tokens as a step encodes, far more than requests have: of the 2B preset's 71,000 pages in 122 GiB it makes 85,000
tokens. Nothing is set apart for images. They and text take pages of one pool, and a request waits for those that its
own images need, so text alone gets all of them.
"""

import logging
from fractions import Fraction

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

from casa_vllm.image_cache_spec import ImageCacheSpec

logger = logging.getLogger("vllm.casa_images")


def text_token_capacity(kv_cache: KVCacheConfig) -> int:
    """Return the text tokens that fit while no image has pages; one page is vLLM's own and never given out."""
    pages_per_token = sum(
        Fraction(1, group.kv_cache_spec.block_size)
        for group in kv_cache.kv_cache_groups
        if not isinstance(group.kv_cache_spec, ImageCacheSpec)
    )
    return int((kv_cache.num_blocks - 1) / pages_per_token)


def report_capacity(vllm_config: VllmConfig, kv_cache: KVCacheConfig) -> None:
    """Log the capacity, and correct the one that vLLM reports to its metrics.

    Mutates:
        `vllm_config.cache_config.kv_cache_size_tokens`, which says nothing to the scheduler.
    """
    image_groups = [
        group.kv_cache_spec for group in kv_cache.kv_cache_groups if isinstance(group.kv_cache_spec, ImageCacheSpec)
    ]
    if not image_groups:
        return
    num_tokens = text_token_capacity(kv_cache)
    vllm_config.cache_config.kv_cache_size_tokens = num_tokens
    most = sum(spec.max_pages_in_use(vllm_config.max_concurrent_batches) for spec in image_groups)
    logger.info(
        "KV cache for text and images together: %s pages, or %s text tokens without an image. %d image tokens take a "
        "page of each of %d groups while their window is open. A start needs %s pages for the images of one request, "
        "which vLLM's \"Maximum concurrency\" counts for every request; text may take them too.",
        f"{kv_cache.num_blocks:,}", f"{num_tokens:,}", image_groups[0].block_size, len(image_groups), f"{most:,}",
    )  # fmt: skip
