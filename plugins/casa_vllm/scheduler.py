"""vLLM's scheduler, with images in pages of their own.

What differs from stock: an image must be in pages not only when its position is scheduled, but
as long as the first scheduled token can still see it (a text prefix hit, a resumed request), and
the pages of one step are bounded. Everything else is vLLM's.
"""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus, StreamingUpdate

from casa_vllm import compat
from casa_vllm.encoder_cache import ImageEncoderCacheManager
from casa_vllm.engine_counters import EngineCounters
from casa_vllm.exit_messages import close_error_output_at_exit
from casa_vllm.image_manager import ImageCacheManager
from casa_vllm.kv_capacity import report_capacity
from casa_vllm.metrics import image_stats
from casa_vllm.request_images import RequestImages
from casa_vllm.sessions import SessionScheduling

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.casa_scheduler")


class ImageScheduling(SessionScheduling):
    """Mixin over `Scheduler`: schedules images by windows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        close_error_output_at_exit()
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
        assert isinstance(self.encoder_cache_manager, ImageEncoderCacheManager)
        self.encoder_cache_manager.bind(self.image_managers)
        report_capacity(self.vllm_config, self.kv_cache_config)
        self.engine_counters = EngineCounters(self.vllm_config) if self.log_stats else None

    def add_request(self, request: Request) -> None:
        """Stock, after a fix of the request's block hasher to hash all images (compat.py)."""
        compat.hash_all_images(request, self.hash_block_size, self.cache_config)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Stock, plus the pixels of images that tokens can still see."""
        output = super().schedule(*args, **kwargs)
        for manager in self.image_managers:
            manager.on_step_scheduled()
        for data in output.scheduled_new_reqs:
            request = self.requests[data.req_id]
            if not self.use_v2_model_runner:
                # The V1 runner resumes a preempted request with the images that it was first sent.
                data.mm_features = list(request.mm_features)
            elif request.mm_features:
                live = self.image_managers[0].images(request).first_live(data.num_computed_tokens)
                data.mm_features = data.mm_features[:live] + request.mm_features[live:]
        for request_id in output.num_scheduled_tokens:
            self._drop_past_pixels(self.requests[request_id])
        return output

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Stock; the image counters go their own way, see `engine_counters`."""
        if self.engine_counters is not None:
            num_free = self.kv_cache_manager.block_pool.get_num_free_blocks()
            self.engine_counters.write(image_stats([m.counters for m in self.image_managers], num_free))
        return super().make_stats(*args, **kwargs)

    def shutdown(self) -> None:
        """Stock, and removes the folder of the counters, if no server has done so."""
        super().shutdown()
        if self.engine_counters is not None:
            self.engine_counters.close()

    def check_chunk(self, session: Request, update: StreamingUpdate, num_tokens: int) -> None:
        """Check that a chunk's images fit after those that its first token can still see.

        A window may begin with images at the end of the previous chunk; its limits are those of one prompt.
        """
        super().check_chunk(session, update, num_tokens)
        images = self.image_managers[0].images(session)
        live = images.first_live(num_tokens)
        added = RequestImages.from_features(update.mm_features or ())
        points = np.append(images.points[live:], added.points + num_tokens)
        counts = np.append(images.num_tokens[live:], added.num_tokens)
        self.image_managers[0].kv_cache_spec.limits.check_windows(points.tolist(), counts.tolist())
        for manager in self.image_managers:
            needed = int((-(-counts // manager.block_size)).sum())
            if needed > manager.row_pages:
                raise ValueError(
                    f"the session's chunk and the images before it need {needed} image pages; expected up to "
                    f"{manager.row_pages}: send fewer or smaller images in a chunk."
                )

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Stock, and removes this step's text, which will not be computed, from the prefix cache (priority scheduling).

        Image pages of the step are removed likewise, see `ImageCacheManager.pop_blocks_for_free`.
        """
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if manager not in self.image_managers:
                blocks = manager.req_to_blocks[request.request_id]
                unsent = blocks[request.num_computed_tokens // manager.block_size :]
                self.kv_cache_manager.block_pool.evict_blocks({block.block_id for block in unsent if not block.is_null})
        super()._preempt_request(request, *args, **kwargs)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[Any, ...]:
        """Choose the images to encode in this step, and the number of tokens that they allow.

        Goes through the images that tokens num_computed.. need and the row lacks. If one does not
        fit into the step (encoder budget, pages), the step ends before its window; images that
        already have pages are pinned.

        Returns:
            Images to encode, number of tokens, the remaining encoder budget, and empty lists for
            further values of vLLM's version (see compat.py).
        """
        manager = self.image_managers[0]
        if (
            request.status == RequestStatus.RUNNING
            and manager.is_complete(request)
            and request.request_id not in self._reasons
        ):
            return compat.encoder_schedule([], num_new_tokens, encoder_compute_budget)
        images = manager.images(request)
        first = manager.first_missing(request, num_computed_tokens)
        end = images.end_before(num_computed_tokens + num_new_tokens)
        if (
            num_new_tokens == 0
            or request.request_id in self._reasons
            or self._exceeds_row(request, num_computed_tokens)
        ):
            return compat.encoder_schedule([], 0, encoder_compute_budget)
        num_pages, pages, budget = images.num_pages(manager.block_size), 0, encoder_compute_budget
        to_encode: list[int] = []
        keys: set[bytes] = set()
        for image in range(first, end):
            pages += int(num_pages[image])
            if pages <= manager.step_pages:
                key = manager.content_key(request, image)
                if key in keys:  # A copy of an image of this step: it shares the pages, see `ImageCacheManager`.
                    continue
                if self.encoder_cache_manager.check_and_update_cache(request, image):
                    continue
                if self.encoder_cache_manager.can_allocate(request, image, budget, 0):
                    budget -= request.get_num_encoder_embeds(image)
                    to_encode.append(image)
                    keys.add(key)
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
            self.reject(request, "its early frames are gone and would have to be encoded again.")
            self.encoder_cache_manager.free(request)
            return compat.encoder_schedule([], 0, encoder_compute_budget)
        return compat.encoder_schedule(to_encode, num_new_tokens, budget)

    def _exceeds_row(self, request: Request, num_computed_tokens: int) -> bool:
        """Reject a request whose images do not fit into a row (a resumed long session)."""
        if request.status == RequestStatus.RUNNING:
            return False
        for manager in self.image_managers:
            images = manager.images(request)
            first = images.first_live(num_computed_tokens)
            needed = int(images.num_pages(manager.block_size)[first:].sum())
            if needed > manager.row_pages:
                self.reject(request, f"it needs {needed} image pages; a row has {manager.row_pages}.")
                return True
        return False

    def _drop_past_pixels(self, request: Request) -> None:
        """Drop the pixels of a session's past frames, which are needed again only if its text is lost too.

        Otherwise they would grow without bound and be sent again with every chunk. A session that is
        preempted and has lost its text then ends with an error (see `reject`).
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
    """Return the engine's scheduler (`scheduler_cls`); vLLM chooses its kind after the config hook."""
    is_async = vllm_config.scheduler_config.async_scheduling
    # vLLM has just warned that a custom scheduler may have switched it off.
    logger.info("CASA's scheduler: asynchronous scheduling is %s.", "on" if is_async else "off")
    scheduler_cls = CasaAsyncScheduler if is_async else CasaScheduler
    return scheduler_cls(*args, vllm_config=vllm_config, **kwargs)
