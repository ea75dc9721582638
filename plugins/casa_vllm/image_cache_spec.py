"""The KV-cache group of images: the size of a page and the most pages of a request."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import CircularBufferSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# An image of one token still takes a page; this limits the pages of a window, in addition to its tokens.
MAX_IMAGES_PER_WINDOW = 16


@dataclass(frozen=True)
class ImageLimits:
    """Limits on the images of a prompt.

    Attributes:
        step_tokens: Most image tokens that one step encodes (the encoder budget); also the most
            in one window.
        max_prompt_tokens: Most image tokens in one prompt.
        max_prompt_images: Most images in one prompt.
    """

    step_tokens: int
    max_prompt_tokens: int
    max_prompt_images: int

    def check_windows(self, points: Sequence[int], counts: Sequence[int]) -> None:
        """Check that each window fits into one step: its first token sees all of its images.

        Args:
            points: Insertion point of each image; equal ones share a window.
            counts: Tokens of each image.

        Raises:
            ValueError: There are too many adjacent images, or too many tokens in them.
        """
        num_images: Counter[int] = Counter(points)
        num_tokens: Counter[int] = Counter()
        for point, count in zip(points, counts, strict=True):
            num_tokens[point] += count
        for point, images in num_images.items():
            if images > MAX_IMAGES_PER_WINDOW or num_tokens[point] > self.step_tokens:
                raise ValueError(
                    f"{images} adjacent images share one window and have {num_tokens[point]} tokens; expected up to "
                    f"{MAX_IMAGES_PER_WINDOW} with {self.step_tokens}: put text between them, or raise "
                    "--max-num-batched-tokens."
                )


@dataclass(frozen=True, kw_only=True)
class ImageCacheSpec(CircularBufferSpec):
    """Cache of one CA layer's image keys and values, in pages of `block_size` image tokens.

    Derived from vLLM's ring buffer, which vLLM neither addresses by text position (no slot
    mapping) nor looks up by text prefix.
    The other attributes are those of `ImageLimits`.
    """

    step_tokens: int
    max_prompt_tokens: int
    max_prompt_images: int

    @property
    def limits(self) -> ImageLimits:
        """Limits on a prompt and a window."""
        return ImageLimits(self.step_tokens, self.max_prompt_tokens, self.max_prompt_images)

    @property
    def uses_slot_mapping(self) -> bool:
        """False: image pages are written by image, not by text position (read by vLLM 0.32)."""
        return False

    @property
    def step_pages(self) -> int:
        """Most pages that one step of one request allocates; a whole window always fits."""
        return cdiv(self.step_tokens, self.block_size) + MAX_IMAGES_PER_WINDOW

    @property
    def row_pages(self) -> int:
        """Most pages in a request's row, released ones included."""
        return cdiv(self.max_prompt_tokens, self.block_size) + self.max_prompt_images

    def max_pages_in_use(self, max_concurrent_batches: int) -> int:
        """Return the most pages in use by a request: the last window and every step still in flight."""
        return (max_concurrent_batches + 1) * self.step_pages

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:
        """Return the bytes that one request may need; vLLM does not start with less."""
        return self.max_pages_in_use(vllm_config.max_concurrent_batches) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: "VllmConfig", max_len: int) -> int:
        """Return the width of the worker's block table.

        At least that of a text group: the V1 runner computes an (unused) slot mapping
        for this group too, indexing the row by text position.
        """
        del vllm_config
        return max(self.row_pages, cdiv(max_len, self.block_size))

    def is_uniform_with_collection(self, kv_cache_specs: dict) -> bool:
        """Return whether all specs are of image layers, which form groups of their own."""
        return all(isinstance(spec, ImageCacheSpec) for spec in kv_cache_specs.values())
