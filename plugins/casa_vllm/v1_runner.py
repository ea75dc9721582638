"""CASA on vLLM's V1 model runner, which serves CPUs.

The runner has no hook for a model's own per-step work, so four of its methods are overridden:
they record the rows that were sent, encode scheduled images into their pages instead of caching the
encoder's output, gather nothing into the text embeddings, and plan the segments that CA's metadata is built of.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from casa_vllm.attention_metadata import Step, set_step
from casa_vllm.image_cache_spec import ImageCacheSpec
from casa_vllm.image_encoding import ImageToEncode, encode_images
from casa_vllm.window_states import WindowStates

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig


class CasaCPUModelRunner(CPUModelRunner):
    """V1 runner with images in pages."""

    def initialize_kv_cache(self, kv_cache_config: "KVCacheConfig", *args: Any, **kw: Any) -> None:
        """Stock, then looks up the KV-cache groups of the CA layers."""
        super().initialize_kv_cache(kv_cache_config, *args, **kw)
        groups = self.kv_cache_config.kv_cache_groups
        self.image_groups = [gid for gid, group in enumerate(groups) if isinstance(group.kv_cache_spec, ImageCacheSpec)]
        # CA layer -> index of its image group.
        self.image_group_of = {
            name: index for index, gid in enumerate(self.image_groups) for name in groups[gid].layer_names
        }
        spec = groups[self.image_groups[0]].kv_cache_spec  # of all image groups
        self.windows = WindowStates(self.max_num_reqs, spec.row_pages, spec.step_pages, spec.block_size)
        # Row in `windows` of each request: preempted and waiting ones keep theirs, so there may be more than scheduled.
        self.row_of: dict[str, int] = {}
        self.free_rows = list(range(self.max_num_reqs))

    def _update_states(self, scheduler_output: "SchedulerOutput") -> Any:
        result = super()._update_states(scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            if request_id in self.row_of:
                self.free_rows.append(self.row_of.pop(request_id))
        cached = scheduler_output.scheduled_cached_reqs
        sent = [data.req_id for data in scheduler_output.scheduled_new_reqs]
        for request_id in [*sent, *cached.resumed_req_ids]:
            state = self.requests[request_id]
            self.windows.add_row(self._row(request_id), state.mm_features, state.num_computed_tokens)
        return result

    def _row(self, request_id: str) -> int:
        """Return the request's row in `windows`, a free one if it has none yet."""
        if request_id not in self.row_of:
            if not self.free_rows:
                num_rows = len(self.windows.table)
                self.windows.grow()
                self.free_rows = list(range(num_rows, len(self.windows.table)))
            self.row_of[request_id] = self.free_rows.pop()
        return self.row_of[request_id]

    def _execute_mm_encoder(self, scheduler_output: "SchedulerOutput") -> list[torch.Tensor]:
        images = []
        tables = [self.input_batch.block_table[gid].get_numpy_array() for gid in self.image_groups]
        for request_id, indexes in scheduler_output.scheduled_encoder_inputs.items():
            rows = [table[self.input_batch.req_id_to_index[request_id]] for table in tables]
            for index in indexes:
                feature = self.requests[request_id].mm_features[index]
                place = self.windows.pages_of(self.row_of[request_id], index)
                num_tokens = feature.mm_position.get_num_embeds()
                images.append(ImageToEncode(feature.data, num_tokens, [row[place] for row in rows]))
        if images:
            encode_images(self.model, images, self.windows.block_size, self.image_group_of, self.device)
        return []

    def _gather_mm_embeddings(
        self, scheduler_output: "SchedulerOutput", shift_computed_tokens: int = 0
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return nothing: image tokens never enter the stream."""
        num_tokens = scheduler_output.total_num_scheduled_tokens
        return [], torch.zeros(num_tokens, dtype=torch.bool)

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        scheduled = kwargs.get("num_scheduled_tokens")
        # Without: a dummy run, in which CA adds nothing.
        set_step(self.attn_groups, None if scheduled is None else self._step(scheduled))
        return super()._build_attention_metadata(*args, **kwargs)

    def _step(self, scheduled: dict[str, int]) -> Step:
        """Plan the step; `scheduled` has the number of tokens of each request."""
        request_ids = self.input_batch.req_ids
        num_requests = len(request_ids)
        rows = np.fromiter(map(self.row_of.__getitem__, request_ids), np.int64, num_requests)
        num_scheduled = np.fromiter(map(scheduled.__getitem__, request_ids), np.int64, num_requests)
        plan = self.windows.plan(rows, self.input_batch.num_computed_tokens_cpu[:num_requests], num_scheduled)
        table = torch.from_numpy(self.windows.table)
        return Step(plan, torch.from_numpy(rows), num_requests, table)


class CasaCPUWorker(CPUWorker):
    """CPU worker with CASA's runner; with Model Runner V2 the stock runner is used."""

    def init_device(self) -> None:
        """Stock, then replaces the runner."""
        super().init_device()
        if not self.use_v2_model_runner:
            self.model_runner = CasaCPUModelRunner(self.vllm_config, self.device)
