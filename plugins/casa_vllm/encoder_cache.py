"""The image pages are the encoder cache.

vLLM asks an encoder cache manager, for each image of a request that is about to be scheduled,
whether its encoder output is at hand. Here that means: are its keys and values in pages? A yes
pins them, until the request's row takes them over or the request is not scheduled after all.
"""

from typing import TYPE_CHECKING

from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.request import Request

from casa_vllm.image_manager import ImageCacheManager

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ImageEncoderCacheManager(EncoderCacheManager):
    """Answers from the image pages; keeps nothing of its own."""

    @classmethod
    def create_manager(cls, *, cache_size: int, vllm_config: "VllmConfig") -> "ImageEncoderCacheManager":
        """Constructor hook called by vLLM."""
        return cls(cache_size)

    def __init__(self, cache_size: int) -> None:
        super().__init__(cache_size)
        self._managers: list[ImageCacheManager] = []

    def bind(self, managers: list[ImageCacheManager]) -> None:
        """Called once by the scheduler with the managers of all image groups (usually one)."""
        self._managers = managers

    def reset(self) -> None:
        """The weights changed: what was encoded before is worthless."""
        super().reset()
        for manager in self._managers:
            manager.reset_cache()

    def check_and_update_cache(self, request: Request, input_id: int) -> bool:
        """Whether every group has the image's pages; pins them if so."""
        request_id = request.request_id
        if all(manager.is_pinned(request_id, input_id) for manager in self._managers):
            return True
        found = [manager.find(request, input_id) for manager in self._managers]
        if any(blocks is None for blocks in found):
            return False
        for manager, blocks in zip(self._managers, found, strict=True):
            manager.pin(request_id, input_id, blocks)
        return True

    def can_allocate(
        self,
        request: Request,
        input_id: int,
        encoder_compute_budget: int,
        num_embeds_to_schedule: int,
    ) -> bool:
        """Whether the step's encoder budget covers the image; pages are `allocate_slots`' job."""
        return request.get_num_encoder_embeds(input_id) <= encoder_compute_budget

    def allocate(self, request: Request, input_id: int) -> None:
        """The row of the image group holds the pages already."""

    def get_cached_input_ids(self, request: Request) -> set[int]:
        """Nothing to free by text progress: rows release their own pages."""
        return set()

    def get_cached_num_encoder_embeds(self, request: Request, input_id: int) -> int | None:
        """Never a mismatch: the size is part of a page's key (asked by vLLM 0.32)."""
        return None

    def free_encoder_input(self, request: Request, input_id: int) -> None:
        """Unpins one image."""
        self.unpin(request, [input_id])

    def free(self, request: Request) -> None:
        """Unpins all images of the request."""
        self.unpin(request)

    def unpin(self, request: Request, images: list[int] | None = None) -> None:
        """Lets go of pinned images that the request's row has not taken over."""
        for manager in self._managers:
            manager.unpin(request.request_id, images)

    def get_freed_mm_hashes(self) -> list[str]:
        """Workers keep no encoder outputs."""
        return []
