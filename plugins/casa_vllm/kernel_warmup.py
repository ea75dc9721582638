"""Runs each Triton kernel once in every form that a step may ask for, so that none is compiled in a request.

vLLM's own warm-up has no images: `ca` would skip its attention in it, and nothing would write image keys. Its requests
are all sampled with top-k and top-p together, captions with top-k alone.
"""

from collections.abc import Iterable, Sequence
from itertools import product

import torch

from casa_vllm.attention_metadata import CasaAttentionMetadata
from casa_vllm.cross_attention import CrossAttention
from casa_vllm.ops import WindowAttentionMetadata
from casa_vllm.ops.build_segments import build_segments
from casa_vllm.ops.segments import SegmentTensors

# vLLM's kernel for top-k and top-p takes over at 8 rows (PyTorch sorts fewer); Triton compiles it once for multiples of
# 16 and once for all others.
TOP_K_BATCHES = (8, 16)


def warm_up_kernels(model: torch.nn.Module, layers: Sequence[CrossAttention], max_num_seqs: int) -> None:
    """Decode, prefill, build segments and write images, with block 0 for an image and without a slot to write to.

    Args:
        model: The CASA model.
        layers: Its CA layers, with their caches.
        max_num_seqs: Most sequences in a step.
    """
    layer = layers[0]  # all have the same sizes
    for num_sequences in _decode_sizes(layer.num_kv_heads, max_num_seqs):
        _attend(layer, num_sequences, query_len=1)
    _attend(layer, num_sequences=1, query_len=2)
    _build_segments(layer)
    hidden_size, merge = model.config.text_config.hidden_size, model.merge_size
    image = torch.zeros(1, hidden_size, dtype=layer.kv_cache.dtype, device=layer.kv_cache.device)
    nowhere = torch.full((1,), -1, dtype=torch.int64, device=image.device)
    grids = torch.tensor([[1, merge, merge]], device="cpu")
    model.write_images(image, grids, {layer.layer_name: nowhere for layer in layers})


def warm_up_sampling(vocab_size: int, device: torch.device) -> None:
    """Cut logits off by top-k, by top-p and by both, with which vLLM's kernel is compiled anew.

    Args:
        vocab_size: V.
        device: Of the logits.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    if device.type == "cpu":  # nothing is compiled, and Triton's interpreter does not run vLLM's kernel
        return
    for batch_size in TOP_K_BATCHES:
        top_k = torch.full((batch_size,), 1, dtype=torch.int32, device=device)
        top_p = torch.full((batch_size,), 0.5, dtype=torch.float32, device=device)
        for limits in ((top_k, None), (None, top_p), (top_k, top_p)):
            apply_top_k_top_p(torch.zeros(batch_size, vocab_size, device=device), *limits)


def _decode_sizes(num_kv_heads: int, max_num_seqs: int) -> Iterable[int]:
    """Return numbers of sequences that, together, have every way to split keys."""
    from casa_vllm.ops.triton_window_attention import decode_splits  # Triton is not on every CPU

    sizes: dict[int, int] = {}
    for num_sequences in range(1, max_num_seqs + 1):
        sizes.setdefault(decode_splits(num_sequences * num_kv_heads), num_sequences)
    return sizes.values()


def _build_segments(layer: CrossAttention) -> None:
    """Build the segment of one token, of a whole request and of a part of one, alone and in a graph's buffers."""
    device = layer.kv_cache.device
    position, state = (
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.zeros(1, 4, dtype=torch.int32, device=device),
    )
    tensors = SegmentTensors.empty(torch.zeros_like(state[0, :2]), 1, 1 if layer.sees_text else None)
    starts = tensors.query_start_loc.clone()
    for splits, padded in product((None, state), (None, (starts, 1))):
        build_segments(tensors, state, position, 1, state, position, splits, padded=padded, use_triton=True)


def _attend(layer: CrossAttention, num_sequences: int, query_len: int) -> None:
    """Run one CA layer over sequences whose windows have an image of one token."""
    cache, num_tokens = layer.kv_cache, num_sequences * query_len

    def filled(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=cache.device)

    windows = WindowAttentionMetadata(
        query_start_loc=query_len * torch.arange(num_sequences + 1, dtype=torch.int32, device=cache.device),
        first_positions=filled(0, num_sequences),
        image_block_table=filled(0, num_sequences, 1),
        image_page_lens=filled(1, num_sequences, 1),
        num_image_pages=filled(1, num_sequences),
        text_starts=filled(0, num_sequences),
        text_rows=filled(0, num_sequences),
        text_block_table=filled(0, 1, 1) if layer.sees_text else None,
        text_slot_mapping=filled(-1, num_tokens, dtype=torch.int64) if layer.sees_text else None,
        max_query_len=query_len,
        max_text_len=query_len if layer.sees_text else 0,
        has_image=True,
        num_tokens=num_tokens,
    )
    positions = filled(0, num_tokens, dtype=torch.int64) if layer.sees_text else None
    layer.attend(*layer.dummy_operands(num_tokens, cache), CasaAttentionMetadata(windows, positions))
