"""Window attention over paged caches, for CPUs (torch) and GPUs (Triton)."""

from casa_vllm.ops.segments import WindowAttentionMetadata, WindowText
from casa_vllm.ops.window_attention import window_attention, write_cache

__all__ = ["WindowAttentionMetadata", "WindowText", "window_attention", "write_cache"]
