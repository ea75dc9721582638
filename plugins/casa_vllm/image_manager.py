"""Maps images to pages: the manager of the image group.

A request's row is the pages of its images in order. Pages are allocated when a window opens, or
found by content if any request had the same image before, and released when the window has
passed; they then stay cached until they are evicted. A session's frames, which nobody but the
session has seen, are evicted first: a live stream shows no frame twice, and would otherwise push
everything else out of the cache in seconds.

    t   0 . . 4 . . . 9 . . .          row after token 9 is processed
    image 0  |  1     |                [null null | b | c c c]       image 0 is released

A page's key is its image's content, not its position: CA keys are rotated relative to the
window's start, so an image's keys and values do not depend on its position.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    get_group_id,
    make_block_hash_with_group_id,
)
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request, RequestStatus

from casa_vllm.image_cache_spec import ImageCacheSpec
from casa_vllm.request_images import RequestImages


@dataclass
class ImageRow:
    """Bookkeeping of a request's row of pages.

    Attributes:
        first_image: Image that the row starts with.
        end_image: One past the last image in the row.
        first_kept: First image of the row whose pages are not released.
        starts: Index in the row of each of its images' first page, and the row's length.
    """

    first_image: int
    end_image: int
    first_kept: int
    starts: list[int] = field(default_factory=lambda: [0])


@dataclass
class ImageCounters:
    """Running totals since the engine started, for the metrics."""

    pages_in_use: int = 0
    pages_shared: int = 0
    pages_released: int = 0
    images_encoded: int = 0
    images_reused: int = 0


class ImageCacheManager(SingleTypeKVCacheManager):
    """Allocates, shares and releases image pages of one KV-cache group."""

    def __init__(self, kv_cache_spec: ImageCacheSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.step_pages = kv_cache_spec.step_pages
        self.row_pages = kv_cache_spec.row_pages
        self.counters = ImageCounters()
        self._requests: Mapping[str, Request] = {}
        self._rows: dict[str, ImageRow] = {}
        self._images: dict[str, RequestImages] = {}
        self._pins: dict[str, dict[int, list[KVCacheBlock]]] = {}
        # Pages allocated in this step, by block id: in the cache, but written only when the step runs.
        self._unwritten: dict[int, str] = {}
        # Pages that a session allocated and that were never found by content since: block id -> what it held then.
        self._unshared_frames: dict[int, BlockHashWithGroupId] = {}
        # A session's passed frames, of which a text prefix hit could still ask for some: end of the window, pages.
        self._passed_frames: dict[str, deque[tuple[int, list[KVCacheBlock]]]] = {}
        self._share_unwritten = True
        self._max_pages_in_use = 2 * self.step_pages

    def bind(self, requests: Mapping[str, Request], share_unwritten: bool, max_concurrent_batches: int) -> None:
        """Set what the manager needs of the scheduler; called once by it.

        Args:
            requests: The scheduler's requests by id.
            share_unwritten: Whether a page may be shared in the step that writes it. Not if
                the writing request may still be dropped from the step (priority scheduling).
            max_concurrent_batches: Steps in flight.
        """
        self._requests = requests
        self._share_unwritten = share_unwritten
        self._max_pages_in_use = self.kv_cache_spec.max_pages_in_use(max_concurrent_batches)

    # Interface for the scheduler and the encoder cache manager.

    def images(self, request: Request) -> RequestImages:
        """Return the request's images, whose number grows in a session."""
        images = self._images.get(request.request_id)
        if images is None or len(images) != len(request.mm_features):
            images = RequestImages.from_features(request.mm_features)
            self._images[request.request_id] = images
        return images

    def is_complete(self, request: Request) -> bool:
        """Return whether the row has all of the request's images, as in every decode step; the cheapest question."""
        row = self._rows.get(request.request_id)
        return row is not None and row.end_image == len(request.mm_features)

    def first_missing(self, request: Request, num_computed_tokens: int) -> int:
        """Return the first image that must be in the row to compute token `num_computed_tokens` and is not."""
        row = self._rows.get(request.request_id)
        if row is not None:
            return row.end_image
        return self.images(request).first_live(num_computed_tokens)

    def find(self, request: Request, image: int) -> list[KVCacheBlock] | None:
        """Return the pages of this image's content, or None unless all of them are in the cache."""
        if not self.enable_caching:
            return None
        key, blocks = self.content_key(request, image), []
        for page in range(-(-int(self.images(request).num_tokens[image]) // self.block_size)):
            found = self.block_pool.get_cached_block(_page_key(key, page), [self.kv_cache_group_id])
            if found is None or (found[0].block_id in self._unwritten and not self._share_unwritten):
                return None
            blocks.append(found[0])
        return blocks

    def content_key(self, request: Request, image: int) -> bytes:
        """Return the key of an image's content. Images share pages if and only if their keys are equal.

        The identifier alone is not enough: a client may send two images with the same one. Tenants (cache salts) and
        adapters do not share.
        """
        adapter = request.lora_request.lora_name if request.lora_request else None
        num_tokens = int(self.images(request).num_tokens[image])
        content = (request.mm_features[image].identifier, num_tokens, request.cache_salt, adapter)
        return hashlib.sha256(repr(content).encode()).digest()

    def is_pinned(self, request_id: str, image: int) -> bool:
        """Return whether this image is pinned for the request."""
        return image in self._pins.get(request_id, {})

    def pin(self, request_id: str, image: int, blocks: list[KVCacheBlock]) -> None:
        """Pin pages that were found until they are added to the row or `unpin` releases them.

        Otherwise an allocation of text in the same step could evict them.
        """
        self._touch(blocks)
        self._pins.setdefault(request_id, {})[image] = blocks

    def unpin(self, request_id: str, images: Iterable[int] | None = None) -> None:
        """Release the given pinned images, or all of the request's."""
        pins = self._pins.get(request_id, {})
        for image in list(pins if images is None else images):
            if image in pins:
                self._release(pins.pop(image))
        if not pins:
            self._pins.pop(request_id, None)

    def reset_cache(self) -> None:
        """Remove all pages from the cache (after a change of the weights)."""
        self.block_pool.evict_blocks(
            {
                block.block_id
                for block in self.block_pool.blocks
                if block.block_hash is not None and get_group_id(block.block_hash) == self.kv_cache_group_id
            }
        )

    # vLLM's interface.

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        **version_dependent: object,
    ) -> int:
        """Return the number of free pages that the images before text token `num_tokens` need."""
        request = self._requests[request_id]
        if self.is_complete(request):
            return 0
        images = self.images(request)
        first = self.first_missing(request, total_computed_tokens)
        num_pages = images.num_pages(self.block_size)
        # Copies share the pages of the step that encodes them, and those of other steps where pages are cached.
        copies_share = self.enable_caching or not apply_admission_cap
        seen: set[bytes] = set()
        needed = 0
        for image in range(first, images.end_before(num_tokens)):
            if self.is_pinned(request_id, image):
                continue
            key = self.content_key(request, image)
            if copies_share and key in seen:
                continue
            seen.add(key)
            # Admission counts images beyond the step; those of the step are pinned if they were found.
            found = self.find(request, image) if apply_admission_cap else None
            needed += int(num_pages[image]) if found is None else self._get_num_evictable_blocks(found)
        return min(needed, self._max_pages_in_use) if apply_admission_cap else needed

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Append the pages of the images before text token `num_tokens` to the row."""
        request = self._requests[request_id]
        if request.status == RequestStatus.RUNNING and self.is_complete(request):
            return []
        images = self.images(request)
        row = self._row(request, images)
        blocks = self.req_to_blocks[request_id]
        new_blocks: list[KVCacheBlock] = []
        new_pages: dict[bytes, list[KVCacheBlock]] = {}
        for image in range(row.end_image, images.end_before(num_tokens)):
            new_blocks += self._pages_for(request, image, images, new_pages)
            row.end_image += 1
            row.starts.append(len(blocks) + len(new_blocks))
        blocks.extend(new_blocks)
        return new_blocks

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Start the row after a text prefix hit, with the images that the prefix's end can still see."""
        request = self._requests[request_id]
        first = self.images(request).first_live(num_local_computed_tokens)
        self._rows[request_id] = ImageRow(first, first, first)

    def allocate_external_computed_blocks(self, *args: object, **kwargs: object) -> None:
        """No-op: the config hook rejects KV connectors."""

    def cache_blocks(self, *args: object, **kwargs: object) -> None:
        """No-op: pages get their keys when they are allocated."""

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Release the images of windows that have passed."""
        row = self._rows.get(request_id)
        if row is None or row.first_kept == row.end_image:
            return
        points = self._images[request_id].points
        if points[row.first_kept] == points[row.end_image - 1]:
            return  # only the latest window: no later one has pages yet
        live = self.images(self._requests[request_id]).first_live(processed_computed_tokens)
        self._release_before(request_id, row, live, processed_computed_tokens)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Remove the row; the caller releases the pages."""
        self._rows.pop(request_id, None)
        self._images.pop(request_id, None)
        self._passed_frames.pop(request_id, None)
        blocks = [b for b in super().pop_blocks_for_free(request_id) if not b.is_null]
        # Dropped from the step that would have written them: they must not be found.
        lost = {b.block_id for b in blocks if self._unwritten.get(b.block_id) == request_id}
        self.block_pool.evict_blocks(lost)
        self.counters.pages_in_use -= self._num_last_uses(blocks)
        return blocks

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Return 0: no cascade attention over images."""
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls, *args: object, kv_cache_group_ids: list[int], block_pool: BlockPool, **kwargs: object
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Unused: the group is not looked up by text prefix."""
        return tuple([] for _ in kv_cache_group_ids), 0

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Return 0: pages are not addressed by text position; see `remove_skipped_blocks`."""
        return 0

    def on_step_scheduled(self) -> None:
        """Mark the step's pages as written: it is scheduled, and steps run in order."""
        self._unwritten.clear()

    # Pages.

    def _row(self, request: Request, images: RequestImages) -> ImageRow:
        """Return the request's row; start it, or cut it to the live images if it will be sent again."""
        row = self._rows.get(request.request_id)
        if row is not None and request.status == RequestStatus.RUNNING:
            return row
        first = images.first_live(request.num_computed_tokens)
        if row is None:
            row = self._rows[request.request_id] = ImageRow(first, first, first)
        elif first > row.first_image:
            # A session's next chunk: as for a new request, its whole row is sent.
            self._release_before(request.request_id, row, first, request.num_computed_tokens)
            dropped = min(first, row.end_image) - row.first_image
            cut = row.starts[dropped]
            del self.req_to_blocks[request.request_id][:cut]
            row.starts = [start - cut for start in row.starts[dropped:]]
            row.first_image = first
            row.end_image = max(row.end_image, first)
            row.first_kept = max(row.first_kept, first)
        return row

    def _release_before(self, request_id: str, row: ImageRow, live: int, num_computed_tokens: int) -> None:
        """Release the pages of the row's images before image `live`, which the computed tokens have passed."""
        end = min(live, row.end_image)
        if end <= row.first_kept:
            return
        blocks = self.req_to_blocks[request_id]
        pages = slice(*(row.starts[image - row.first_image] for image in (row.first_kept, end)))
        released = blocks[pages]
        blocks[pages] = [self._null_block] * len(released)
        row.first_kept = end
        self.counters.pages_released += len(released)
        self._release(released)
        passed = self._passed_frames.setdefault(request_id, deque())
        passed.append((int(self._images[request_id].points[live]), released))
        # A request that lost its pages is computed anew from the last full page of its text on.
        recomputed_from = num_computed_tokens - num_computed_tokens % self.block_size
        while passed and passed[0][0] <= recomputed_from:
            self._evict_first(passed.popleft()[1])

    def _pages_for(
        self, request: Request, image: int, images: RequestImages, new_pages: dict[bytes, list[KVCacheBlock]]
    ) -> list[KVCacheBlock]:
        """Return the pages of one image: pinned, those of its copy in the same step, or new.

        Mutates:
            `new_pages`: new pages of the step, which the worker will write, by content key.
        """
        pins = self._pins.get(request.request_id, {})
        blocks = pins.pop(image, None)
        key = self.content_key(request, image)
        if blocks is None and (blocks := new_pages.get(key)) is not None:
            self._touch(blocks)
        if blocks is not None:
            self.counters.images_reused += 1
            self.counters.pages_shared += len(blocks)
            return blocks
        blocks = new_pages[key] = self.block_pool.get_new_blocks(int(images.num_pages(self.block_size)[image]))
        self.counters.pages_in_use += len(blocks)
        self.counters.images_encoded += 1
        if self.enable_caching:
            for page, block in enumerate(blocks):
                self.block_pool._insert_block_hash(
                    make_block_hash_with_group_id(_page_key(key, page), self.kv_cache_group_id), block, None
                )
                self._unwritten[block.block_id] = request.request_id
                if request.resumable:
                    self._unshared_frames[block.block_id] = block.block_hash
                else:
                    self._unshared_frames.pop(block.block_id, None)
        return blocks

    def _touch(self, blocks: list[KVCacheBlock]) -> None:
        self.counters.pages_in_use += sum(block.ref_cnt == 0 for block in blocks)
        self.block_pool.touch(blocks)
        for block in blocks:
            self._unshared_frames.pop(block.block_id, None)

    def _release(self, blocks: list[KVCacheBlock]) -> None:
        self.counters.pages_in_use -= self._num_last_uses(blocks)
        # Last page first, so that an image is lost from its end.
        self.block_pool.free_blocks(reversed(blocks))

    def _evict_first(self, passed: list[KVCacheBlock]) -> None:
        """Move a session's passed frames to where the next pages are taken from; others keep their turn (LRU)."""
        free = []
        for block in reversed(passed):
            if not block.ref_cnt and self._is_unshared_frame(block):
                self.block_pool.free_block_queue.remove(block)
                # An image may have been shown twice: its pages are moved once.
                del self._unshared_frames[block.block_id]
                free.append(block)
        self.block_pool.free_block_queue.prepend_n(free)

    def _is_unshared_frame(self, block: KVCacheBlock) -> bool:
        # Somebody else, text too, may have been given the page since.
        return block.block_hash is not None and block.block_hash == self._unshared_frames.get(block.block_id)

    @staticmethod
    def _num_last_uses(blocks: list[KVCacheBlock]) -> int:
        """Return how many pages are free once `blocks` (with repetitions) are released."""
        uses = Counter(block.block_id for block in blocks)
        holders = {block.block_id: block.ref_cnt for block in blocks}
        return sum(holders[block_id] == count for block_id, count in uses.items())


def _page_key(content_key: bytes, page: int) -> BlockHash:
    """Return the key of one page of an image in vLLM's block pool."""
    return BlockHash(content_key + page.to_bytes(4, "big"))


def register_image_cache() -> None:
    """Register spec and manager with vLLM. Idempotent."""
    # vLLM registers its own specs only while none is registered.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(ImageCacheSpec, ImageCacheManager, ImageCacheSpec)
