"""Window attention over paged caches, for CPUs (torch) and GPUs (Triton)."""

from casa_vllm.ops.segments import WindowAttentionMetadata
from casa_vllm.ops.window_attention import window_attention, write_pages

__all__ = ["WindowAttentionMetadata", "window_attention", "write_pages"]
