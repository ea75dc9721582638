"""The attention metadata of CA layers: one builder for both model runners.

A runner plans a step once (`set_step`) and then lets vLLM build the metadata of all groups. The builder of an
image group builds the tensors of the step's segments, that of a text cache's group hands on vLLM's own tables. A layer
of `ca_tv` reads both, under the names of its two caches.

In a full CUDA graph a step's segments are in buffers with a row for each token of the largest graph. The graph is
captured over these and reads whatever a step has written there: nothing that it reads is ever reallocated, no length is
a constant in it. A graph of T tokens has T segments:

    decode                              one a request, a token each; padding segments are empty
    requests of any length              one a request and window; the next has the padding tokens, the others are empty
    (see `v2_chunk_graphs`)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.triton_utils import HAS_TRITON
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheSpec

from casa_vllm.ops import WindowAttentionMetadata
from casa_vllm.ops.build_segments import build_segments
from casa_vllm.ops.segments import SegmentTensors
from casa_vllm.window_states import SegmentPlan

# vLLM's worker with graphs of short prefills. It starts with no other runner than the one that keeps their promise.
GPU_WORKER = "casa_vllm.v2_chunk_graphs.CasaGPUWorker"


@dataclass
class CasaAttentionMetadata:
    """What a CA layer reads from the forward context, under its image cache's layer name.

    Attributes:
        windows: Segments of the step.
        relative_positions: (T or more,) int64, position of each token counted from the start of
            its window; None for `ca`, which has no rotary embedding.
    """

    windows: WindowAttentionMetadata
    relative_positions: torch.Tensor | None
    _with_text: list[tuple[CommonAttentionMetadata, "CasaAttentionMetadata"]] = field(default_factory=list, repr=False)

    def with_text(self, text: CommonAttentionMetadata) -> "CasaAttentionMetadata":
        """Return the same segments with the tables of a text group; all layers of the group get one object."""
        for known, joined in self._with_text:  # one or two
            if known is text:
                return joined
        tables = {"text_block_table": text.block_table_tensor, "text_slot_mapping": text.slot_mapping}
        joined = CasaAttentionMetadata(replace(self.windows, **tables), self.relative_positions)
        self._with_text.append((text, joined))
        return joined


@dataclass(frozen=True)
class Step:
    """A step's requests, as a runner passes them.

    Attributes:
        plan: Its segments; None where a full CUDA graph of decode runs the step, or captures it: a token a request.
        rows: (R or more,) int64 on the device, row of each request's state.
        num_requests: R; 0 for a made-up batch, whose requests have no images.
        state: (rows, 3 + row pages) int32 on the device, see `WindowStates`.
        in_graph: Whether a full CUDA graph runs the step, or captures it.
    """

    plan: SegmentPlan | None
    rows: torch.Tensor
    num_requests: int
    state: torch.Tensor
    in_graph: bool = False


class GraphSupport:
    """What CA caches declare to vLLM of full CUDA graphs."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        """Return graphs of any step, with the worker that promises them the length of queries; of decode otherwise."""
        if vllm_config.parallel_config.worker_cls == GPU_WORKER:
            return AttentionCGSupport.ALWAYS
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


class TextMetadataBuilder(GraphSupport, AttentionMetadataBuilder[CommonAttentionMetadata]):
    """Hands on vLLM's tables of a text group."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CommonAttentionMetadata:
        """Return the group's block table and slot mapping."""
        return common_attn_metadata


class ImageMetadataBuilder(GraphSupport, AttentionMetadataBuilder[CasaAttentionMetadata]):
    """Builds the segments of a step for the CA layers of an image group."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        self._sees_text = layers[layer_names[0]].sees_text
        self.step: Step | None = None

    @cached_property
    def _graph_tensors(self) -> SegmentTensors:
        """The buffers that graphs read."""
        config = self.vllm_config
        max_tokens = max(
            config.scheduler_config.max_num_seqs, config.compilation_config.max_cudagraph_capture_size or 0
        )
        query_start_loc = torch.zeros(max_tokens + 1, dtype=torch.int32, device=self.device)
        return SegmentTensors.empty(
            query_start_loc, self.kv_cache_spec.step_pages, max_tokens if self._sees_text else None
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CasaAttentionMetadata | None:
        """Return the step's segments, without text tables; None if the layers add nothing in it."""
        step, common = self.step, common_attn_metadata
        if step is None:
            return None
        plan = step.plan
        if not (step.in_graph or self._sees_text or plan.max_pages):
            return None
        starts, splits = self._given_segments(plan, common)
        if not step.in_graph:
            tensors = SegmentTensors.empty(
                starts, max(plan.max_pages, 1), len(common.positions) if self._sees_text else None
            )
        elif plan is None:
            # The runner's own starts are in a persistent, padded buffer as well.
            tensors = self._graph_tensors.first(starts)
        else:
            tensors = self._graph_tensors.first(self._graph_tensors.query_start_loc[: common.num_actual_tokens + 1])
        build_segments(
            tensors,
            step.state,
            step.rows,
            step.num_requests,
            common.block_table_tensor,
            common.positions,
            splits,
            padded=(starts, plan.num_segments) if step.in_graph and plan is not None else None,
            use_triton=HAS_TRITON,
        )
        return self._metadata(tensors, None if step.in_graph else plan, common)

    def _given_segments(
        self, plan: SegmentPlan | None, common: CommonAttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the starts of a step's segments, and what the host has split of them, on the device."""
        if plan is None or plan.splits is None:
            return common.query_start_loc, None
        staged = np.concatenate((plan.query_start_loc, plan.splits.ravel()))
        sent = async_tensor_h2d(staged, device=self.device)
        return sent[: plan.num_segments + 1], sent[plan.num_segments + 1 :].view(plan.splits.shape)

    def _metadata(
        self, tensors: SegmentTensors, plan: SegmentPlan | None, common: CommonAttentionMetadata
    ) -> CasaAttentionMetadata:
        """Return the metadata; without a plan that of a graph, which holds for whatever it replays."""
        first_positions, text_starts, num_pages, requests = tensors.fields
        max_text_len = self.vllm_config.model_config.max_model_len if plan is None else plan.max_text_len
        windows = WindowAttentionMetadata(
            query_start_loc=tensors.query_start_loc,
            first_positions=first_positions,
            image_block_table=tensors.pages,
            image_page_lens=tensors.page_lens,
            num_image_pages=num_pages,
            text_starts=text_starts,
            text_rows=requests,
            text_block_table=None,
            text_slot_mapping=None,
            max_query_len=common.max_query_len if plan is None else plan.max_query_len,
            max_text_len=max_text_len if self._sees_text else 0,
            has_image=plan is None or plan.max_pages > 0,
            num_tokens=common.num_actual_tokens if plan is None else plan.num_tokens,
        )
        return CasaAttentionMetadata(windows, tensors.relative_positions)


def set_step(attention_groups: Sequence[Sequence[Any]], step: Step | None) -> None:
    """Set the step that the next call of vLLM builds metadata for; None: CA layers get none, and add nothing.

    Called in every step with the runner's current groups: vLLM makes others after it has profiled graphs.

    Mutates:
        The builders of the image groups.
    """
    for groups in attention_groups:
        for group in groups:
            builder = group.get_metadata_builder(0)
            if isinstance(builder, ImageMetadataBuilder):
                builder.step = step
