"""vLLM's scheduler, with images that live in pages of their own.

What differs from stock: an image must be in pages not only when its position is scheduled, but
as long as the first scheduled token can still see it (a text prefix hit, a resumed request), and
the pages of one step are bounded. Everything else is vLLM's.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus, StreamingUpdate

from casa_vllm import compat
from casa_vllm.image_manager import ImageCacheManager
from casa_vllm.metrics import attach_image_stats
from casa_vllm.residency import ImageResidency

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


class ImageScheduling:
    """Mixin over `Scheduler`: schedules images by windows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.image_managers = [
            manager
            for manager in self.kv_cache_manager.coordinator.single_type_managers
            if isinstance(manager, ImageCacheManager)
        ]
        for manager in self.image_managers:
            manager.bind(
                self.requests,
                share_unwritten=self.policy != SchedulingPolicy.PRIORITY,
                max_concurrent_batches=self.vllm_config.max_concurrent_batches,
            )
        assert isinstance(self.encoder_cache_manager, ImageResidency)
        self.encoder_cache_manager.bind(self.image_managers)

    def add_request(self, request: Request) -> None:
        """Stock, after making sure that text blocks are hashed with all their images."""
        compat.hash_all_images(request, self.hash_block_size, self.cache_config)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Stock, plus the pixels of images that can still be seen."""
        output = super().schedule(*args, **kwargs)
        for manager in self.image_managers:
            manager.step_was_sent()
        for data in output.scheduled_new_reqs:
            request = self.requests[data.req_id]
            if not self.use_v2_model_runner:
                # The V1 runner resumes a preempted request from what it was sent first.
                data.mm_features = list(request.mm_features)
            elif request.mm_features:
                live = self.image_managers[0].images(request).first_live(data.num_computed_tokens)
                data.mm_features = data.mm_features[:live] + request.mm_features[live:]
        for request_id in output.num_scheduled_tokens:
            self._forget_past_pixels(self.requests[request_id])
        return output

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Stock, plus the image counters."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            num_free = self.kv_cache_manager.block_pool.get_num_free_blocks()
            attach_image_stats(stats, [m.counters for m in self.image_managers], num_free)
        return stats

    def _handle_stopped_request(self, request: Request) -> bool:
        """Stock, after a session's steps in flight are taken back.

        A chunk ends with a token that was only sampled, and the next chunk brings it again. With asynchronous
        scheduling the step that computes it may be on its way already: counted, the session would hold it twice.
        """
        if request.resumable:
            compat.drop_steps_in_flight(request)
        return super()._handle_stopped_request(request)

    def _update_request_as_session(self, session: Request, update: StreamingUpdate) -> None:
        """Stock, and what 0.29.0 forgets: the chunk's own token limit, and hashes of text that is taken back."""
        del session.block_hashes[session.num_computed_tokens // self.hash_block_size :]
        super()._update_request_as_session(session, update)
        session.max_tokens = update.max_tokens

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[Any, ...]:
        """Which images to encode in this step, and how many tokens that allows.

        Goes through the images that tokens num_computed.. need and the row lacks. Where one does
        not fit into the step (encoder budget, pages), the step ends before its window; images
        that already have pages are pinned.

        Returns:
            Images to encode, number of tokens, what is left of the encoder budget, and empty
            lists for what vLLM's version adds (see compat.py).
        """
        manager = self.image_managers[0]
        images = manager.images(request)
        first = manager.first_missing(request, num_computed_tokens)
        end = images.end_before(num_computed_tokens + num_new_tokens)
        if num_new_tokens == 0 or self._is_hopeless(request, num_computed_tokens):
            return compat.encoder_schedule([], 0, encoder_compute_budget)
        num_pages, pages, budget = images.num_pages(manager.block_size), 0, encoder_compute_budget
        to_encode: list[int] = []
        for image in range(first, end):
            pages += int(num_pages[image])
            identifiers = {request.mm_features[other].identifier for other in to_encode}
            if pages <= manager.step_pages:
                if request.mm_features[image].identifier in identifiers:
                    continue
                if self.encoder_cache_manager.check_and_update_cache(request, image):
                    continue
                if self.encoder_cache_manager.can_allocate(request, image, budget, 0):
                    budget -= request.get_num_encoder_embeds(image)
                    to_encode.append(image)
                    continue
            # All images of a window or none: its first token sees them all.
            num_new_tokens = max(int(images.points[image]) - num_computed_tokens, 0)
            last = images.end_before(num_computed_tokens + num_new_tokens) if num_new_tokens else 0
            self.encoder_cache_manager.unpin(request, list(range(max(last, first), end)))
            dropped = [other for other in to_encode if other >= last]
            budget += sum(request.get_num_encoder_embeds(other) for other in dropped)
            to_encode = to_encode[: len(to_encode) - len(dropped)]
            break
        if any(request.mm_features[image].data is None for image in to_encode):
            self._reject(request, "its early frames are gone and would have to be encoded again")
            self.encoder_cache_manager.free(request)
            return compat.encoder_schedule([], 0, encoder_compute_budget)
        return compat.encoder_schedule(to_encode, num_new_tokens, budget)

    def _is_hopeless(self, request: Request, num_computed_tokens: int) -> bool:
        """Rejects a request whose images do not fit into a row (a resumed long session)."""
        if request.status == RequestStatus.RUNNING:
            return False
        for manager in self.image_managers:
            images = manager.images(request)
            first = images.first_live(num_computed_tokens)
            needed = int(images.num_pages(manager.block_size)[first:].sum())
            if needed > manager.row_pages:
                self._reject(request, f"it needs {needed} image pages; a row has {manager.row_pages}")
                return True
        return False

    def _reject(self, request: Request, reason: str) -> None:
        logger.warning("Request %s ends with an error: %s.", request.request_id, reason)
        # Both vLLM versions end the requests in this set with an error after the step.
        self.grammar_compile_error_reqs.add(request.request_id)

    def _forget_past_pixels(self, request: Request) -> None:
        """A session's past frames are never needed again unless its text is lost too.

        Kept, they would grow without bound and be sent again with every chunk. A session that is
        preempted and has lost its text then ends with an error (see `_reject`).
        """
        if not request.resumable or not request.mm_features:
            return
        processed = request.num_computed_tokens - request.num_in_flight_tokens
        live = self.image_managers[0].images(request).first_live(processed)
        for image in range(live - 1, -1, -1):
            if request.mm_features[image].data is None:
                break
            request.mm_features[image] = replace(request.mm_features[image], data=None)


class CasaScheduler(ImageScheduling, Scheduler):
    """Synchronous scheduling."""


class CasaAsyncScheduler(ImageScheduling, AsyncScheduler):
    """Asynchronous scheduling."""


def create_scheduler(*args: Any, vllm_config: "VllmConfig", **kwargs: Any) -> Scheduler:
    """The engine's `scheduler_cls`: whether scheduling is asynchronous is decided after the hook."""
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler_cls = CasaAsyncScheduler if is_async else CasaScheduler
    return scheduler_cls(*args, vllm_config=vllm_config, **kwargs)
