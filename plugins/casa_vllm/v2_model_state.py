"""CASA on vLLM's Model Runner V2 (GPUs): images, segments and CUDA graphs of one step.

Order of a step, all of it outside of any graph but the last:

    prepare_attn            segments of the step: planned in NumPy, copied to the device
    prepare_inputs_embeds   encode the scheduled images, write their K/V of all layers to pages
    forward                 eagerly, or as a replay of the decode graph

A decode step has one segment a request, so its tensors fit into buffers of `max_num_seqs` rows.
The graph is captured over these buffers and reads whatever a step has put there: nothing that it
reads is ever allocated anew, and it knows no length as a number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from casa_vllm.cross_attention import CasaAttentionMetadata, CrossAttention
from casa_vllm.image_cache_spec import register_image_cache
from casa_vllm.image_encoding import image_slots
from casa_vllm.ops import WindowAttentionMetadata
from casa_vllm.v2_caption_sampler import CaptionSampler
from casa_vllm.window_table import SegmentPlan, WindowTable

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState


@dataclass
class SegmentTensors:
    """A plan's arrays on the device; V segments, T tokens, P pages of the widest segment.

    Attributes:
        fields: (5, V) int32: rows, first positions, text starts, numbers of pages, first pages.
        page_lens: (V, P) int32.
        relative_positions: (T or more,) int64; 0 for padding.
    """

    fields: torch.Tensor
    page_lens: torch.Tensor
    relative_positions: torch.Tensor

    @classmethod
    def zeros(cls, num_segments: int, num_pages: int, device: torch.device) -> "SegmentTensors":
        """Segments of one token, without an image, in a window that starts at 0."""
        return cls(
            torch.zeros(5, num_segments, dtype=torch.int32, device=device),
            torch.zeros(num_segments, num_pages, dtype=torch.int32, device=device),
            torch.zeros(num_segments, dtype=torch.int64, device=device),
        )

    @classmethod
    def from_plan(cls, plan: SegmentPlan, num_tokens: int, device: torch.device) -> "SegmentTensors":
        """Copies without waiting for the device.

        Args:
            plan: Segments of T tokens.
            num_tokens: T, or more where the batch is padded for a piecewise graph.
            device: Where to.
        """
        positions = np.zeros(num_tokens, dtype=np.int64)
        positions[: len(plan.relative_positions)] = plan.relative_positions
        fields = (
            plan.rows,
            plan.first_positions,
            plan.text_starts,
            plan.num_pages,
            plan.first_pages,
        )
        return cls(
            async_tensor_h2d(np.stack(fields).astype(np.int32), device=device),
            async_tensor_h2d(plan.page_lens, device=device),
            async_tensor_h2d(positions, device=device),
        )

    def first(self, num_segments: int) -> "SegmentTensors":
        """The first V segments of V tokens, as views."""
        return SegmentTensors(
            self.fields[:, :num_segments],
            self.page_lens[:num_segments],
            self.relative_positions[:num_segments],
        )

    def overwrite(self, step: "SegmentTensors | None") -> None:
        """Puts a step's segments in front and empties the rest. Mutates the buffers."""
        for buffer in (self.fields, self.page_lens, self.relative_positions):
            buffer.zero_()
        if step is not None:
            num_segments, num_pages = step.page_lens.shape
            self.fields[:, :num_segments].copy_(step.fields)
            self.page_lens[:num_segments, :num_pages].copy_(step.page_lens)
            self.relative_positions[:num_segments].copy_(step.relative_positions)

    def image_blocks(self, block_table: torch.Tensor) -> torch.Tensor:
        """(V, P) int32: each segment's pages, from its request's row of (R, row width) pages."""
        rows, first_pages = self.fields[0].long(), self.fields[4].long()
        columns = torch.arange(self.page_lens.shape[1], device=block_table.device)
        # Columns beyond a segment's pages hold anything; nobody reads them.
        columns = (first_pages[:, None] + columns).clamp_(max=block_table.shape[1] - 1)
        return block_table[rows[:, None], columns]


class CasaModelState(DefaultModelState):
    """Per-step state of models with CA layers; insertion models use vLLM's own."""

    # The text is embedded inside the model's graph; the config hook refuses the option with its own words.
    supports_prompt_embeds = False

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        register_image_cache()  # in worker processes the config hook has not run
        self._layers = [layer for layer in model.modules() if isinstance(layer, CrossAttention)]
        self._image_block_tables: dict[str, torch.Tensor] = {}
        self._decode_blocks: list[torch.Tensor] = []
        # Made with the sampler, on the ranks that sample.
        self._captions: CaptionSampler | None = None

    @cached_property
    def _block_size(self) -> int:
        # Of the bound cache: vLLM may have enlarged the blocks that the spec asked for.
        return self._layers[0].kv_cache.shape[2]

    @cached_property
    def _table(self) -> WindowTable:
        return WindowTable(self._block_size)

    @cached_property
    def _decode_buffers(self) -> SegmentTensors:
        spec = self._layers[0].get_kv_cache_spec(self.vllm_config)
        max_pages = replace(spec, block_size=self._block_size).step_pages
        return SegmentTensors.zeros(self.max_num_reqs, max_pages, self.device)

    def add_request(self, req_index: int, new_req_data: "NewRequestData") -> None:
        """A request is new, resumed, or a session's next chunk: its whole row was sent."""
        super().add_request(req_index, new_req_data)
        self._table.row_sent(new_req_data.req_id, new_req_data.mm_features, new_req_data.num_computed_tokens)
        if self._captions is not None:
            self._captions.chunk_sent(new_req_data)

    def remove_request(self, req_id: str) -> None:
        """The request is finished, preempted, or about to be added again."""
        super().remove_request(req_id)
        self._table.remove(req_id)
        if self._captions is not None:
            self._captions.forget(req_id)

    def custom_sampler(self, sampler: Any) -> tuple[CaptionSampler, None]:
        """VLLM's sampler with the rules of live sessions (speculative decoding is refused by the config hook)."""
        self._captions = CaptionSampler(sampler)
        return self._captions, None

    def prepare_attn(
        self,
        input_batch: "InputBatch",
        cudagraph_mode: CUDAGraphMode,
        *args: Any,
        for_capture: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The metadata of self-attention, plus that of every CA layer under its own name."""
        metadata = super().prepare_attn(input_batch, cudagraph_mode, *args, for_capture=for_capture, **kwargs)
        # The runner says NONE while it captures.
        in_graph = for_capture or cudagraph_mode == CUDAGraphMode.FULL
        plan = None if for_capture else self._plan(input_batch)
        step = None
        if plan is not None:
            num_tokens = input_batch.num_tokens if in_graph else input_batch.num_tokens_after_padding
            step = SegmentTensors.from_plan(plan, num_tokens, self.device)
        if in_graph:
            self._decode_buffers.overwrite(step)
            step = self._decode_buffers.first(input_batch.num_reqs_after_padding)
        made: dict[tuple[int, int], CasaAttentionMetadata] = {}
        image_groups: dict[int, torch.Tensor] = {}
        for layer in self._layers:
            images = metadata[layer.layer_name]
            text = metadata[layer.text_cache.layer_name] if layer.text_cache is not None else None
            if id(images) not in image_groups:
                blocks = step.image_blocks(images.block_table_tensor)
                if in_graph:
                    blocks = self._keep_blocks(len(image_groups), blocks)
                image_groups[id(images)] = blocks
            key = (id(images), id(text))
            if key not in made:
                made[key] = self._layer_metadata(input_batch, plan, step, image_groups[id(images)], text, in_graph)
            self._image_block_tables[layer.layer_name] = images.block_table_tensor
            metadata[layer.layer_name] = made[key]
        return metadata

    def _plan(self, input_batch: "InputBatch") -> SegmentPlan:
        table, request_ids = self._table, input_batch.req_ids
        if request_ids[0] not in self.encoder_cache.mm_features:
            # A dummy batch (warm-up, graph memory profiling): requests without images.
            table = WindowTable(self._block_size)
            for request_id in request_ids:
                table.row_sent(request_id, (), 0)
        return table.plan(request_ids, input_batch.num_computed_tokens_np, input_batch.num_scheduled_tokens)

    def _keep_blocks(self, group: int, blocks: torch.Tensor) -> torch.Tensor:
        """The blocks at the address that decode graphs read. Mutates the group's buffer."""
        if group == len(self._decode_blocks):
            shape = self._decode_buffers.page_lens.shape
            self._decode_blocks.append(blocks.new_zeros(shape))
        kept = self._decode_blocks[group][: len(blocks)]
        kept.copy_(blocks)
        return kept

    def _layer_metadata(
        self,
        input_batch: "InputBatch",
        plan: SegmentPlan | None,
        step: SegmentTensors,
        image_blocks: torch.Tensor,
        text: Any,
        in_graph: bool,
    ) -> CasaAttentionMetadata:
        if in_graph:
            # One token a request: the runner's own persistent buffer, padded, says it all.
            query_start_loc, max_query_len = input_batch.query_start_loc, 1
            num_tokens, has_image = input_batch.num_tokens_after_padding, True
        else:
            query_start_loc = async_tensor_h2d(plan.query_start_loc, device=self.device)
            max_query_len, num_tokens = plan.max_query_len, int(plan.query_start_loc[-1])
            has_image = bool(plan.num_pages.any())
        max_text_len = self.max_model_len if plan is None else plan.max_text_len
        windows = WindowAttentionMetadata(
            query_start_loc=query_start_loc,
            first_positions=step.fields[1],
            image_block_table=image_blocks,
            image_page_lens=step.page_lens,
            num_image_pages=step.fields[3],
            text_starts=step.fields[2],
            text_rows=step.fields[0],
            text_block_table=None if text is None else text.block_table_tensor,
            text_slot_mapping=None if text is None else text.slot_mapping,
            max_query_len=max_query_len,
            max_text_len=0 if text is None else max_text_len,
            has_image=has_image,
            num_tokens=num_tokens,
        )
        return CasaAttentionMetadata(windows, None if text is None else step.relative_positions)

    def prepare_inputs_embeds(
        self,
        scheduled_encoder_inputs: dict[str, list[int]],
        input_batch: "InputBatch",
        req_states: "RequestState",
    ) -> None:
        """Encodes the step's images into their pages. The text is embedded by the model."""
        scheduled = [
            (row, request_id, image)
            for row, request_id in enumerate(input_batch.req_ids)
            for image in scheduled_encoder_inputs.get(request_id, ())
        ]
        if scheduled:
            with self.encoder_runner.timed_encoder_operation(scheduled_encoder_inputs.keys()):
                self._encode(scheduled)

    def _encode(self, scheduled: Sequence[tuple[int, str, int]]) -> None:
        """Runs the vision encoder and writes keys and values of all CA layers to pages.

        Args:
            scheduled: (row in the batch, request, image) of each image.
        """
        features = [self.encoder_cache.mm_features[request_id][image] for _, request_id, image in scheduled]
        images = self.encoder_runner.execute_mm_encoder([(feature.modality, feature.data) for feature in features])
        slots_by_table: dict[int, torch.Tensor] = {}
        for table in self._image_block_tables.values():
            if table.data_ptr() in slots_by_table:
                continue
            slots = []
            for (row, request_id, image), tokens in zip(scheduled, images, strict=True):
                pages = table[row, self._table.pages_of(request_id, image)]
                slots.append(image_slots(pages, self._block_size, len(tokens)))
            slots_by_table[table.data_ptr()] = torch.cat(slots)
        self.model.write_images(
            torch.cat(list(images)),
            torch.stack([feature.data["image_grid_thw"].data for feature in features]),
            {name: slots_by_table[table.data_ptr()] for name, table in self._image_block_tables.items()},
        )

    def dummy_inputs_embeds(self, num_tokens: int) -> None:
        """Token ids go in; the embedding is part of the model's graph."""

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Nothing beside token ids and positions."""
        return {}
