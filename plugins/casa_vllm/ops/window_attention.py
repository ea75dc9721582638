"""Window attention over paged caches: the one entry to its torch and Triton implementations.

A cache is what vLLM binds to a layer: (num_blocks, Hkv, block_size, 2 * D) with strides of its
own, keys in [..., :D] and values in [..., D:]. The image cache and the text cache may differ in
block size and in strides, never in heads.
"""

import torch

from casa_vllm.ops.segments import WindowAttentionMetadata
from casa_vllm.ops.torch_window_attention import torch_window_attention, torch_write_pages


def window_attention(
    query: torch.Tensor,
    image_cache: torch.Tensor,
    text_cache: torch.Tensor | None,
    metadata: WindowAttentionMetadata,
    scale: float,
    output: torch.Tensor,
    beside: torch.Tensor | None = None,
    *,
    use_triton: bool,
) -> None:
    """Attend each query to its window's image tokens and, for `ca_tv`, its window's text.

    A query without any key gets exactly 0. Slots that no query may read are never read for their
    value: NaN in them does not reach the output.

    Args:
        query: (T or more, H, D), rotated where the model rotates.
        image_cache: (image blocks, Hkv, block_size, 2 * D).
        text_cache: (text blocks, Hkv, block_size, 2 * D), holding this step's own keys already;
            None for `ca`.
        metadata: the segments of this step.
        scale: factor on the scores.
        output: (T or more, H, D), or with `beside` (T or more, 2 H, D), whatever is in it; rows beyond T and of
            padding segments become 0.
        beside: (T or more, H, D), heads contiguous: copied into the first H heads of `output`, before the results.
        use_triton: run the Triton kernels (GPU, or CPU under Triton's interpreter).

    Mutates:
        output, and `metadata.torch_buckets` where the torch implementation runs.

    Raises:
        ValueError: A tensor has fewer rows than the step has tokens: a kernel would read and write beyond its end.
    """
    rows = min(len(tensor) for tensor in (query, output, beside) if tensor is not None)
    if rows < metadata.num_tokens:
        raise ValueError(
            f"window attention has {rows} rows for a step of {metadata.num_tokens} tokens; expected a row for each. "
            "The step was planned for another graph than the one it runs in."
        )
    if len(output) > metadata.num_tokens:
        output[metadata.num_tokens :] = 0
    results = output if beside is None else output[:, beside.shape[1] :]
    if use_triton and (metadata.text_block_table is not None or metadata.has_image):
        # Triton is not there on every CPU installation.
        from casa_vllm.ops.triton_window_attention import triton_window_attention

        triton_window_attention(query, image_cache, text_cache, metadata, scale, results, beside)
        return
    if beside is not None:
        output[: metadata.num_tokens, : beside.shape[1]] = beside[: metadata.num_tokens]
    if metadata.text_block_table is None and not metadata.has_image:
        results[: metadata.num_tokens] = 0
    else:
        torch_window_attention(query, image_cache, text_cache, metadata, scale, results)


def write_pages(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    use_triton: bool,
) -> None:
    """Write keys and values (T, Hkv, D) to their cache slots.

    Args:
        key: (T or more, Hkv, D); rows beyond `slots` are padding.
        value: as `key`.
        cache: (num_blocks, Hkv, block_size, 2 * D).
        slots: (T or more,) int64, block * block_size + offset; negative ones write nothing.
        use_triton: run the Triton kernel.

    Mutates:
        cache.
    """
    if use_triton:
        from casa_vllm.ops.triton_window_attention import triton_write_pages

        triton_write_pages(key, value, cache, slots)
    else:
        torch_write_pages(key, value, cache, slots)
