"""CASA on vLLM's Model Runner V2 (GPUs): images, windows and CUDA graphs of one step.

Order of a step; only the last part may be in a CUDA graph:

    prepare_attn            windows that moved on are written to the device, one kernel builds the step's segments
    prepare_inputs_embeds   encode the scheduled images, write their K/V of all layers to pages
    forward                 eagerly, or as a replay of a graph: of decode, or of requests of any length

See `casa_vllm.attention_metadata` for what a graph reads.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from casa_vllm.attention_metadata import Step, set_step
from casa_vllm.cross_attention import CrossAttention
from casa_vllm.image_cache_spec import ImageCacheSpec
from casa_vllm.image_encoding import image_slots
from casa_vllm.image_manager import register_image_cache
from casa_vllm.kernel_warmup import warm_up_kernels
from casa_vllm.ops.segments import PAGE_LENS
from casa_vllm.v2_caption_sampler import CaptionSampler
from casa_vllm.window_states import SegmentPlan, WindowStates

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState
    from vllm.v1.worker.utils import AttentionGroup


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
        # Of the last step: names of each image group's layers, and its block table in batch order.
        self._image_groups: list[tuple[list[str], torch.Tensor]] = []
        self._is_warm = False
        self._request_ids: set[str] = set()
        # Created with the sampler, on the ranks that sample.
        self._captions: CaptionSampler | None = None

    @cached_property
    def _windows(self) -> WindowStates:
        # vLLM may have enlarged the blocks of the allocated cache; a row has no more pages for that.
        spec, block_size = self._layers[0].get_kv_cache_spec(self.vllm_config), self._layers[0].kv_cache.shape[2]
        return WindowStates(self.max_num_reqs, spec.row_pages, spec.step_pages, block_size)

    @cached_property
    def _device_windows(self) -> StagedWriteTensor:
        # Not made with the model: sleep mode discards what is allocated while weights are loaded.
        row_pages = self._layers[0].get_kv_cache_spec(self.vllm_config).row_pages
        return StagedWriteTensor((self.max_num_reqs, PAGE_LENS + row_pages), dtype=torch.int32, device=self.device)

    def add_request(self, req_index: int, new_req_data: "NewRequestData") -> None:
        """Add a new or resumed request, or a session's next chunk, whose whole row was sent."""
        super().add_request(req_index, new_req_data)
        self._request_ids.add(new_req_data.req_id)
        self._windows.add_row(req_index, new_req_data.mm_features, new_req_data.num_computed_tokens)
        if self._captions is not None:
            self._captions.add_row(req_index, new_req_data)

    def remove_request(self, req_id: str) -> None:
        """Remove a request that is finished, preempted, or about to be added again."""
        super().remove_request(req_id)
        self._request_ids.discard(req_id)
        if self._captions is not None:
            self._captions.remove_row(req_id)

    def custom_sampler(self, sampler: Any) -> tuple[CaptionSampler, None]:
        """Return vLLM's sampler with the rules of live sessions (the config hook rejects speculative decoding)."""
        self._captions = CaptionSampler(sampler)
        return self._captions, None

    def prepare_attn(
        self,
        input_batch: "InputBatch",
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: "list[list[AttentionGroup]]",
        kv_cache_config: "KVCacheConfig",
        for_capture: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the metadata of self-attention, and that of every CA layer under its own name.

        The first call is vLLM's, before the engine serves: it warms the kernels up.
        """
        if not self._is_warm:
            self._is_warm = True
            warm_up_kernels(self.model, self._layers, self.max_num_reqs)
            if self._captions is not None:
                self._captions.warm_up()
        # The runner passes NONE while it captures.
        in_graph = for_capture or cudagraph_mode == CUDAGraphMode.FULL
        set_step(attn_groups, self._step(input_batch, in_graph=in_graph))
        self._image_groups = [
            (group.layer_names, table)
            for group, table in zip(kv_cache_config.kv_cache_groups, block_tables, strict=True)
            if isinstance(group.kv_cache_spec, ImageCacheSpec)
        ]
        return super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            for_capture=for_capture,
            **kwargs,
        )

    def _step(self, input_batch: "InputBatch", *, in_graph: bool) -> Step:
        """Plan the step and write the windows that moved on to the device.

        Raises:
            RuntimeError: The step has requests of several tokens in a graph of decode, which would attend wrongly.
        """
        # Of the length of queries a graph of decode promises nothing, or (vLLM 0.32) one token.
        is_decode = in_graph and input_batch.max_query_len in (None, 1)
        if is_decode and input_batch.num_tokens > input_batch.num_reqs:
            raise RuntimeError(
                f"A CUDA graph of decode got {input_batch.num_tokens} tokens of {input_batch.num_reqs} requests; "
                "expected a token each. Something has replaced casa_vllm's runner: remove it, or start with "
                "--worker-cls vllm.v1.worker.gpu_worker.Worker, without graphs of prefills."
            )
        rows, num_requests = input_batch.idx_mapping_np, input_batch.num_reqs
        num_computed, num_scheduled = input_batch.num_computed_tokens_np, input_batch.num_scheduled_tokens
        plan = None
        if input_batch.req_ids[0] not in self._request_ids:
            # A made-up batch (warm-up, capture, memory profiling): its rows are nobody's, or somebody else's.
            num_requests = 0
            if not is_decode:
                plan = SegmentPlan.without_images(num_computed, num_scheduled)
        elif is_decode:
            self._windows.advance(rows, num_computed)
        else:
            plan = self._windows.plan(rows, num_computed, num_scheduled)
        self._send_windows()
        return Step(plan, input_batch.idx_mapping, num_requests, self._device_windows.gpu, in_graph)

    def _send_windows(self) -> None:
        """Write changed rows to the device, in one write. Mutates the copy there."""
        for row, num_values in self._windows.changed.items():
            self._device_windows.stage_write(row, 0, self._windows.table[row, :num_values].tolist())
        self._windows.changed.clear()
        self._device_windows.apply_write()

    def prepare_inputs_embeds(
        self,
        scheduled_encoder_inputs: dict[str, list[int]],
        input_batch: "InputBatch",
        req_states: "RequestState",
    ) -> None:
        """Encode the step's images into their pages. The text is embedded by the model."""
        if scheduled_encoder_inputs:
            with self.encoder_runner.timed_encoder_operation(scheduled_encoder_inputs.keys()):
                self._encode(scheduled_encoder_inputs, input_batch)

    def _encode(self, scheduled: dict[str, list[int]], input_batch: "InputBatch") -> None:
        """Run the vision encoder and write keys and values of all CA layers to pages.

        Args:
            scheduled: Images of each request.
            input_batch: The step's requests.
        """
        requests = {request_id: index for index, request_id in enumerate(input_batch.req_ids)}
        features, places = [], []
        for request_id, images in scheduled.items():
            request = requests[request_id]
            for image in images:
                features.append(self.encoder_cache.mm_features[request_id][image])
                places.append((request, self._windows.pages_of(input_batch.idx_mapping_np[request], image)))
        encoded = self.encoder_runner.execute_mm_encoder([(feature.modality, feature.data) for feature in features])
        slots: dict[str, torch.Tensor] = {}
        for layer_names, table in self._image_groups:
            of_images = [
                image_slots(table[place], self._windows.block_size, len(tokens))
                for place, tokens in zip(places, encoded, strict=True)
            ]
            slots |= dict.fromkeys(layer_names, torch.cat(of_images))
        grids = torch.stack([feature.data["image_grid_thw"].data for feature in features])
        self.model.write_images(torch.cat(list(encoded)), grids, slots)

    def dummy_inputs_embeds(self, num_tokens: int) -> None:
        """Return None: the embedding is part of the model's graph.

        vLLM's memory profiling calls it: what every step needs is allocated by then, and counted.
        """
        _ = self._device_windows

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Return no inputs besides token ids and positions."""
        return {}
