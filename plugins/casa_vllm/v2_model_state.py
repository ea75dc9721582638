"""CASA on vLLM's Model Runner V2 (GPUs): images, segments and CUDA graphs of one step.

Order of a step; only the last part may be in a CUDA graph:

    prepare_attn            segments of the step: planned in NumPy, copied to the device
    prepare_inputs_embeds   encode the scheduled images, write their K/V of all layers to pages
    forward                 eagerly, or as a replay of the decode graph

A decode step has one segment a request, so its tensors fit into buffers of `max_num_seqs` rows.
The graph is captured over these buffers and reads whatever a step has written there: nothing that it
reads is ever reallocated, and no length is a constant in it.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from casa_vllm.cross_attention import CasaAttentionMetadata, CrossAttention
from casa_vllm.image_encoding import image_slots
from casa_vllm.image_manager import register_image_cache
from casa_vllm.kernel_warmup import warm_up_kernels
from casa_vllm.segment_planner import SegmentPlan, WindowTable
from casa_vllm.segment_tensors import SegmentTensors
from casa_vllm.v2_caption_sampler import CaptionSampler

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState


class CasaModelState(DefaultModelState):
    """Per-step state of models with CA layers; insertion models use vLLM's own."""

    # The text is embedded inside the model's graph; the config hook rejects the option with its own message.
    supports_prompt_embeds = False

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        register_image_cache()  # the config hook does not run in worker processes
        self._layers = [layer for layer in model.modules() if isinstance(layer, CrossAttention)]
        self._image_block_tables: dict[str, torch.Tensor] = {}
        self._decode_blocks: list[torch.Tensor] = []
        self._is_warm = False
        # Created with the sampler, on the ranks that sample.
        self._captions: CaptionSampler | None = None

    @cached_property
    def _block_size(self) -> int:
        # Of the allocated cache: vLLM may have enlarged the spec's blocks.
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
        """Adds a new or resumed request, or a session's next chunk, whose whole row was sent."""
        super().add_request(req_index, new_req_data)
        self._table.add_row(new_req_data.req_id, new_req_data.mm_features, new_req_data.num_computed_tokens)
        if self._captions is not None:
            self._captions.add_row(req_index, new_req_data)

    def remove_request(self, req_id: str) -> None:
        """Removes a request that is finished, preempted, or about to be added again."""
        super().remove_request(req_id)
        self._table.remove(req_id)
        if self._captions is not None:
            self._captions.remove_row(req_id)

    def custom_sampler(self, sampler: Any) -> tuple[CaptionSampler, None]:
        """Returns vLLM's sampler with the rules of live sessions (the config hook rejects speculative decoding)."""
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
        """Returns the metadata of self-attention, plus that of every CA layer under its own name.

        The first call is vLLM's, before the engine serves: it warms the kernels up.
        """
        if not self._is_warm:
            self._is_warm = True
            warm_up_kernels(self.model, self._layers, self.max_num_reqs)
            if self._captions is not None:
                self._captions.warm_up()
        metadata = super().prepare_attn(input_batch, cudagraph_mode, *args, for_capture=for_capture, **kwargs)
        # The runner passes NONE while it captures.
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
                    blocks = self._copy_to_graph_buffer(len(image_groups), blocks)
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
                table.add_row(request_id, (), 0)
        return table.plan(request_ids, input_batch.num_computed_tokens_np, input_batch.num_scheduled_tokens)

    def _copy_to_graph_buffer(self, group: int, blocks: torch.Tensor) -> torch.Tensor:
        """Returns the blocks, copied to the address that decode graphs read. Mutates the group's buffer."""
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
        max_text_len = self.max_model_len if plan is None else plan.max_text_len
        if in_graph:
            # One token per request: the runner's own persistent, padded buffer suffices.
            return step.attention_metadata(
                input_batch.query_start_loc,
                image_blocks,
                text,
                max_query_len=1,
                max_text_len=max_text_len,
                has_image=True,
                num_tokens=input_batch.num_tokens_after_padding,
            )
        return step.attention_metadata(
            async_tensor_h2d(plan.query_start_loc, device=self.device),
            image_blocks,
            text,
            max_query_len=plan.max_query_len,
            max_text_len=max_text_len,
            has_image=plan.has_image,
            num_tokens=plan.num_tokens,
        )

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
        """Returns None: the embedding is part of the model's graph."""

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Returns no inputs besides token ids and positions."""
        return {}
