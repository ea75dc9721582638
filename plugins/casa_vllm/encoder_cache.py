"""The image pages are the encoder cache.

vLLM asks an encoder cache manager, for each image of a request that is about to be scheduled,
whether its encoder output is cached. Here that means: are its keys and values in pages? If they
are, it pins them, until they are added to the request's row or the request is not scheduled after all.
"""

from typing import TYPE_CHECKING

from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.request import Request

from casa_vllm.image_manager import ImageCacheManager

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ImageEncoderCacheManager(EncoderCacheManager):
    """Encoder cache manager backed by the image pages; stores nothing itself."""

    @classmethod
    def create_manager(cls, *, cache_size: int, vllm_config: "VllmConfig") -> "ImageEncoderCacheManager":
        """Constructor hook called by vLLM."""
        return cls(cache_size)

    def __init__(self, cache_size: int) -> None:
        super().__init__(cache_size)
        self._managers: list[ImageCacheManager] = []

    def bind(self, managers: list[ImageCacheManager]) -> None:
        """Set the managers of all image groups (usually one); called once by the scheduler."""
        self._managers = managers

    def reset(self) -> None:
        """Drop all cached images, after a change of the weights."""
        super().reset()
        for manager in self._managers:
            manager.reset_cache()

    def check_and_update_cache(self, request: Request, input_id: int) -> bool:
        """Return whether every group has the image's pages, and pin them if so."""
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
        """Return whether the step's encoder budget covers the image; `allocate_slots` allocates the pages."""
        return request.get_num_encoder_embeds(input_id) <= encoder_compute_budget

    def allocate(self, request: Request, input_id: int) -> None:
        """No-op: the row of the image group has the pages already."""

    def get_cached_input_ids(self, request: Request) -> set[int]:
        """Return an empty set: rows release their own pages."""
        return set()

    def get_cached_num_encoder_embeds(self, request: Request, input_id: int) -> int | None:
        """Return None, no mismatch: the size is part of a page's key (called by vLLM 0.32)."""
        return None

    def free_encoder_input(self, request: Request, input_id: int) -> None:
        """Unpin one image."""
        self.unpin(request, [input_id])

    def free(self, request: Request) -> None:
        """Unpin all images of the request."""
        self.unpin(request)

    def unpin(self, request: Request, images: list[int] | None = None) -> None:
        """Release pinned images that were not added to the request's row."""
        for manager in self._managers:
            manager.unpin(request.request_id, images)

    def get_freed_mm_hashes(self) -> list[str]:
        """Return an empty list: workers cache no encoder outputs."""
        return []
