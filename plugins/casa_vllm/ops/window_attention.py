"""Window attention over paged caches: the one entry to its torch and Triton implementations.

Both caches have the layout (2, num_blocks, block_size, Hkv, D): keys, then values. The image
cache and the text cache may differ in block size, never in heads.
"""

import torch

from casa_vllm.ops.segments import WindowAttentionMetadata
from casa_vllm.ops.torch_window_attention import torch_window_attention, torch_write_cache


def window_attention(
    query: torch.Tensor,
    image_cache: torch.Tensor,
    text_cache: torch.Tensor | None,
    metadata: WindowAttentionMetadata,
    scale: float,
    output: torch.Tensor,
    *,
    use_triton: bool,
) -> None:
    """Attends each query to its window's image tokens and, for `ca_tv`, its window's text.

    A query without any key gets exactly 0. Slots that no query may read are never read for their
    value: NaN in them does not reach the output.

    Args:
        query: (T or more, H, D), rotated where the model rotates.
        image_cache: (2, image blocks, block_size, Hkv, D), image keys rotated likewise.
        text_cache: (2, text blocks, block_size, Hkv, D), holding this step's own keys already;
            None for `ca`.
        metadata: segments of this step.
        scale: factor on the scores.
        output: (T or more, H, D); rows 0..T-1 are written.
        use_triton: run the Triton kernels (GPU, or CPU under Triton's interpreter).

    Mutates:
        output, and `metadata.torch_buckets` where the torch implementation runs.
    """
    if metadata.text is None and not metadata.has_images:
        output[: metadata.num_actual_tokens] = 0
    elif use_triton:
        from casa_vllm.ops.triton_window_attention import triton_window_attention

        triton_window_attention(query, image_cache, text_cache, metadata, scale, output)
    else:
        torch_window_attention(query, image_cache, text_cache, metadata, scale, output)


def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    use_triton: bool,
) -> None:
    """Writes keys and values (T, Hkv, D) to their cache slots.

    Args:
        key: (T, Hkv, D) or longer than `slot_mapping`; the excess is padding.
        value: as `key`.
        cache: (2, num_blocks, block_size, Hkv, D).
        slot_mapping: (T or more,) int64, block * block_size + offset; negative writes nothing.
        use_triton: run the Triton kernel.

    Mutates:
        cache.
    """
    if use_triton:
        from casa_vllm.ops.triton_window_attention import triton_write_cache

        triton_write_cache(key, value, cache, slot_mapping)
    else:
        torch_write_cache(key, value, cache, slot_mapping)
