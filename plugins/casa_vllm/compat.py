"""What differs between the vLLM versions that the plugin supports, in one place."""

from typing import TYPE_CHECKING, Any

import vllm
from packaging.version import Version
from vllm.multimodal.utils import get_mm_features_in_window
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    generate_block_hash_extra_keys,
    hash_block_tokens,
)

if TYPE_CHECKING:
    from vllm.config import CacheConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

OLDEST, NEWEST = Version("0.29.0"), Version("0.32.0")
VERSION = Version(Version(vllm.__version__).base_version)
HAS_DUPLICATE_INPUTS = VERSION >= Version("0.32.0")
# 0.29.0 hashes a block with its last image only, if generated tokens or a session's next
# chunk complete the block: two texts with different images would share it.
HASHES_LAST_IMAGE_ONLY = VERSION < Version("0.32.0")
# 0.29.0 counts the output of steps that are in flight when a chunk finishes as part of its answer.
COUNTS_STEPS_IN_FLIGHT = VERSION < Version("0.32.0")


def check_version() -> None:
    """Raise RuntimeError for a version of vLLM that the plugin was never tested with."""
    if not OLDEST <= VERSION <= NEWEST:
        raise RuntimeError(
            f"vLLM is {vllm.__version__}; casa_vllm works with {OLDEST} to {NEWEST}. "
            "Install one of these, or a newer casa-engine."
        )


def encoder_schedule(images: list[int], num_new_tokens: int, budget: int) -> tuple:
    """Return the result of `Scheduler._try_schedule_encoder_inputs`.

    0.29: images, tokens, budget, external loads. 0.32 adds duplicates of scheduled images, which
    the image rows resolve by themselves.
    """
    extra = ([], []) if HAS_DUPLICATE_INPUTS else ([],)
    return (images, num_new_tokens, budget, *extra)


def keeps_items(processor: Any, inputs: Any) -> bool:
    """Return whether vLLM caches processed images of these inputs.

    0.29 passes a cache to the processor's constructor, 0.32 with the inputs.
    """
    return (inputs.cache if VERSION >= Version("0.32.0") else processor.cache) is not None


def cache_item(item: Any) -> Any:
    """What the cache of processed images keeps of one; 0.32 has its class in a module of a package."""
    from vllm.multimodal import cache

    if VERSION >= Version("0.32.0"):
        from vllm.multimodal.cache import base as cache
    return cache.MultiModalProcessorCacheItem(item, ())


def processing_result(inputs: Any, kwargs: Any, hashes: dict[str, list[str]], updates: dict[str, Any]) -> Any:
    """Return the result of `BaseMultiModalProcessor._cached_apply_hf_processor`. 0.32 adds the prompt."""
    from vllm.multimodal.processing import processor

    if VERSION >= Version("0.32.0"):
        return processor.MultiModalProcessingResult(list(inputs.prompt), kwargs, hashes, updates)
    return processor.MultiModalProcessingInfo(kwargs, hashes, updates)


def waiting_requests(scheduler: "Scheduler") -> list["Request"]:
    """Return waiting requests, in the order in which first-come-first-served scheduling tries them."""
    name = "kv_holding_waiting" if VERSION >= Version("0.32.0") else "skipped_waiting"
    return [*getattr(scheduler, name), *scheduler.waiting]


def max_running_requests(scheduler: "Scheduler") -> int:
    """Return `max_num_seqs`: how many requests may run at once, idle sessions included."""
    return scheduler.max_num_active_reqs if VERSION >= Version("0.32.0") else scheduler.max_num_running_reqs


def drop_steps_in_flight(request: "Request") -> None:
    """Reset a session's request to the tokens computed when its chunk ended, as 0.32 does itself.

    Mutates:
        `request`: the number of computed tokens; outputs still to come are dropped.
    """
    if not COUNTS_STEPS_IN_FLIGHT:
        return
    request.num_computed_tokens -= request.num_output_placeholders
    request.num_output_placeholders = 0
    request.drop_stale_output = True
    request.num_stale_output_tokens = request.num_in_flight_tokens


def hash_all_images(request: "Request", block_size: int, cache_config: "CacheConfig") -> None:
    """Replace the request's block hasher with one that hashes every image of a block.

    Mutates:
        `request._block_hasher`, on versions whose own ignores images.
    """
    if not HASHES_LAST_IMAGE_ONLY or request._block_hasher is None:
        return
    hash_fn = get_hash_fn_by_name(cache_config.prefix_caching_hash_algo)

    def new_block_hashes(request: "Request") -> list[BlockHash]:
        hashes = list(request.block_hashes)
        num_old = len(hashes)
        for start in range(num_old * block_size, request.num_tokens - block_size + 1, block_size):
            end = start + block_size
            first_image, _ = get_mm_features_in_window(request.mm_features, start, end)
            extra_keys, _ = generate_block_hash_extra_keys(request, start, end, first_image)
            tokens = request.all_token_ids[start:end]
            parent = hashes[-1] if hashes else None
            hashes.append(hash_block_tokens(hash_fn, parent, tokens, extra_keys))
        return hashes[num_old:]

    request._block_hasher = new_block_hashes
