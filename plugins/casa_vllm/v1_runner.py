"""CASA on vLLM's V1 model runner, which serves CPUs.

The runner has no hook for a model's own per-step work, so four of its methods are overridden:
they record the rows that were sent, encode scheduled images into their pages instead of caching the
encoder's output, gather nothing into the text embeddings, and add the segments for CA layers.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from casa_vllm.cross_attention import CasaAttentionMetadata, CrossAttention
from casa_vllm.image_cache_spec import ImageCacheSpec
from casa_vllm.image_encoding import ImageToEncode, encode_images
from casa_vllm.segment_planner import SegmentPlan, WindowTable
from casa_vllm.segment_tensors import SegmentTensors

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig


class CasaCPUModelRunner(CPUModelRunner):
    """V1 runner with images in pages."""

    def initialize_kv_cache(self, kv_cache_config: "KVCacheConfig", *args: Any, **kw: Any) -> None:
        """Stock, then looks up the KV-cache groups of the CA layers."""
        super().initialize_kv_cache(kv_cache_config, *args, **kw)
        groups = self.kv_cache_config.kv_cache_groups
        group_of = {name: gid for gid, group in enumerate(groups) for name in group.layer_names}
        self.image_groups = [gid for gid, group in enumerate(groups) if isinstance(group.kv_cache_spec, ImageCacheSpec)]
        self.block_sizes = [groups[gid].kv_cache_spec.block_size for gid in self.image_groups]
        # CA layer -> index of its image group, and its text group (None for `ca`).
        self.image_group_of: dict[str, int] = {}
        self.text_group_of: dict[str, int | None] = {}
        for name, layer in self.compilation_config.static_forward_context.items():
            if isinstance(layer, CrossAttention):
                self.image_group_of[name] = self.image_groups.index(group_of[name])
                text = layer.text_cache
                self.text_group_of[name] = None if text is None else group_of[text.layer_name]
        self.windows = [WindowTable(size) for size in self.block_sizes]

    def _update_states(self, scheduler_output: "SchedulerOutput") -> Any:
        result = super()._update_states(scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            for windows in self.windows:
                windows.remove(request_id)
        cached = scheduler_output.scheduled_cached_reqs
        sent = [data.req_id for data in scheduler_output.scheduled_new_reqs]
        for request_id in [*sent, *cached.resumed_req_ids]:
            state = self.requests[request_id]
            for windows in self.windows:
                windows.add_row(request_id, state.mm_features, state.num_computed_tokens)
        return result

    def _execute_mm_encoder(self, scheduler_output: "SchedulerOutput") -> list[torch.Tensor]:
        images = []
        for request_id, indexes in scheduler_output.scheduled_encoder_inputs.items():
            rows = [table[self._row(request_id)] for table in self._image_tables()]
            for index in indexes:
                feature = self.requests[request_id].mm_features[index]
                pages = [
                    row[windows.pages_of(request_id, index)] for row, windows in zip(rows, self.windows, strict=True)
                ]
                images.append(ImageToEncode(feature.data, feature.mm_position.get_num_embeds(), pages))
        if images:
            encode_images(self.model, images, self.block_sizes, self.image_group_of, self.device)
        return []

    def _gather_mm_embeddings(
        self, scheduler_output: "SchedulerOutput", shift_computed_tokens: int = 0
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Returns nothing: image tokens never enter the stream."""
        num_tokens = scheduler_output.total_num_scheduled_tokens
        return [], torch.zeros(num_tokens, dtype=torch.bool)

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        metadata, spec_decode = super()._build_attention_metadata(*args, **kwargs)
        scheduled = kwargs.get("num_scheduled_tokens")
        request_ids = self.input_batch.req_ids
        sees_text = any(group is not None for group in self.text_group_of.values())
        if scheduled is None or not (sees_text or self.windows[0].has_images(request_ids)):
            # A dummy run, or `ca` without an image: its layers add nothing.
            for name in self.image_group_of:
                metadata.pop(name, None)
            return metadata, spec_decode
        computed = self.input_batch.num_computed_tokens_cpu[: len(request_ids)]
        num_scheduled = np.array([scheduled[request_id] for request_id in request_ids])
        plans = [table.plan(request_ids, computed, num_scheduled) for table in self.windows]
        built: dict[tuple[int, int | None], CasaAttentionMetadata] = {}
        for name, image_group in self.image_group_of.items():
            text_group = self.text_group_of[name]
            if (image_group, text_group) not in built:
                text = None if text_group is None else metadata[f"{name}.text"]
                built[image_group, text_group] = self._casa_metadata(plans[image_group], image_group, text)
            metadata[name] = built[image_group, text_group]
        return metadata, spec_decode

    def _casa_metadata(
        self, plan: SegmentPlan, image_group: int, text: CommonAttentionMetadata | None
    ) -> CasaAttentionMetadata:
        step = SegmentTensors.from_plan(plan, plan.num_tokens, self.device)
        return step.attention_metadata(
            torch.from_numpy(plan.query_start_loc),
            step.image_blocks(torch.from_numpy(self._image_tables()[image_group])),
            text,
            max_query_len=plan.max_query_len,
            max_text_len=plan.max_text_len,
            has_image=plan.has_image,
            num_tokens=plan.num_tokens,
        )

    def _image_tables(self) -> list[np.ndarray]:
        """Returns the rows of image pages in batch order, for each image group."""
        tables = self.input_batch.block_table
        return [tables[gid].get_numpy_array() for gid in self.image_groups]

    def _row(self, request_id: str) -> int:
        return self.input_batch.req_id_to_index[request_id]


class CasaCPUWorker(CPUWorker):
    """CPU worker with CASA's runner; with Model Runner V2 the stock runner is used."""

    def init_device(self) -> None:
        """Stock, then replaces the runner."""
        super().init_device()
        if not self.use_v2_model_runner:
            self.model_runner = CasaCPUModelRunner(self.vllm_config, self.device)
