"""The attention metadata of CA layers: one builder for both model runners.

A runner plans a step once (`set_step`) and then lets vLLM build the metadata of all groups. The builder of an
image group builds the tensors of the step's segments, that of a text cache's group hands on vLLM's own tables. A layer
of `ca_tv` reads both, under the names of its two caches.

In a full CUDA graph a decode step's segments are in buffers of `max_num_seqs` rows. The graph is captured over these
and reads whatever a step has written there: nothing that it reads is ever reallocated, no length is a constant in it.
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
        """Returns the same segments with the tables of a text group; all layers of the group get one object."""
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
        plan: Its segments; None where a full CUDA graph runs the step, or captures it: a token a request.
        rows: (R or more,) int64 on the device, row of each request's state.
        num_requests: R; 0 for a made-up batch, whose requests have no images.
        state: (rows, 3 + row pages) int32 on the device, see `WindowStates`.
    """

    plan: SegmentPlan | None
    rows: torch.Tensor
    num_requests: int
    state: torch.Tensor


class TextMetadataBuilder(AttentionMetadataBuilder[CommonAttentionMetadata]):
    """Hands on vLLM's tables of a text group."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CommonAttentionMetadata:
        """Returns the group's block table and slot mapping."""
        return common_attn_metadata


class ImageMetadataBuilder(AttentionMetadataBuilder[CasaAttentionMetadata]):
    """Builds the segments of a step for the CA layers of an image group."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        self._sees_text = layers[layer_names[0]].sees_text
        self.step: Step | None = None

    @cached_property
    def _graph_tensors(self) -> SegmentTensors:
        """The buffers of `max_num_seqs` segments that decode graphs read."""
        max_num_seqs = self.vllm_config.scheduler_config.max_num_seqs
        query_start_loc = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=self.device)
        return SegmentTensors.empty(
            query_start_loc, self.kv_cache_spec.step_pages, max_num_seqs if self._sees_text else None
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CasaAttentionMetadata | None:
        """Returns the step's segments, without text tables; None if the layers add nothing in it."""
        step, common = self.step, common_attn_metadata
        if step is None:
            return None
        if step.plan is None:
            # The runner's own starts are in a persistent, padded buffer as well.
            tensors, splits = self._graph_tensors.first(common.query_start_loc), None
        elif not (self._sees_text or step.plan.max_pages):
            return None
        else:
            tensors, splits = self._eager_tensors(step.plan, common)
        build_segments(
            tensors,
            step.state,
            step.rows,
            step.num_requests,
            common.block_table_tensor,
            common.positions,
            splits,
            use_triton=HAS_TRITON,
        )
        return self._metadata(tensors, step.plan, common)

    def _eager_tensors(
        self, plan: SegmentPlan, common: CommonAttentionMetadata
    ) -> tuple[SegmentTensors, torch.Tensor | None]:
        """Returns tensors for the plan's segments, and what the host has split of them, sent to the device."""
        num_pages, num_positions = max(plan.max_pages, 1), len(common.positions) if self._sees_text else None
        if plan.splits is None:
            return SegmentTensors.empty(common.query_start_loc, num_pages, num_positions), None
        staged = np.concatenate((plan.query_start_loc, plan.splits.ravel()))
        sent = async_tensor_h2d(staged, device=self.device)
        splits = sent[plan.num_segments + 1 :].view(plan.splits.shape)
        return SegmentTensors.empty(sent[: plan.num_segments + 1], num_pages, num_positions), splits

    def _metadata(
        self, tensors: SegmentTensors, plan: SegmentPlan | None, common: CommonAttentionMetadata
    ) -> CasaAttentionMetadata:
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
            max_query_len=1 if plan is None else plan.max_query_len,
            max_text_len=max_text_len if self._sees_text else 0,
            has_image=plan is None or plan.max_pages > 0,
            num_tokens=common.num_actual_tokens if plan is None else plan.num_tokens,
        )
        return CasaAttentionMetadata(windows, tensors.relative_positions)


def set_step(attention_groups: Sequence[Sequence[Any]], step: Step | None) -> None:
    """Sets the step that the next call of vLLM builds metadata for; None: CA layers get none, and add nothing.

    Called in every step with the runner's current groups: vLLM makes others after it has profiled graphs.

    Mutates:
        The builders of the image groups.
    """
    for groups in attention_groups:
        for group in groups:
            builder = group.get_metadata_builder(0)
            if isinstance(builder, ImageMetadataBuilder):
                builder.step = step
