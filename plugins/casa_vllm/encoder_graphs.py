"""The vision encoder as CUDA graphs: what vLLM's manager of such graphs asks of a model.

    pixels (uint8) -> normalised and cut -> graph's buffers -> replay: encoder, norm behind it -> image tokens

vLLM captures the encoder for a few numbers of image tokens and replays the smallest that fits a batch, with vLLM's
option `cudagraph_mm_encoder`. What a batch lacks to the graph's number is computed for nothing: vLLM would take powers
of two, and up to half of the work would be lost. The encoder is that of vLLM's Qwen2.5-VL, and so are its buffers: the
methods of that model are called with the encoder alone.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.model_executor.models.interfaces import SupportsEncoderCudaGraph
from vllm.v1.worker.encoder_cudagraph_defs import (
    EncoderCudaGraphCaptureInputs,
    EncoderCudaGraphConfig,
    EncoderCudaGraphReplayBuffers,
    EncoderItemSpec,
)

from casa_engine.image_patches import PatchValues
from casa_engine.rope import image_token_counts

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Image tokens of the smallest graph, and of the largest: four frames of 896 px. Beyond that an operation takes
# far longer than its launch, and a graph's memory grows with its tokens.
MIN_GRAPH_TOKENS, MAX_GRAPH_TOKENS = 64, 4096
# Tokens up to which graphs lie so far apart. Of 448 px (256 tokens) one to eight frames fit exactly, of 896 px (1,024
# tokens) all that fit at all.
GRAPH_STEPS = ((512, 64), (1024, 128), (2048, 256), (MAX_GRAPH_TOKENS, 512))


def graph_tokens(max_step_tokens: int) -> list[int]:
    """Return the image tokens of each graph, ascending, for steps that encode up to `max_step_tokens`."""
    largest, sizes = min(max_step_tokens, MAX_GRAPH_TOKENS), [0]
    for end, step in GRAPH_STEPS:
        sizes += range(sizes[-1] + step, end + 1, step)
    return [*(size for size in sizes[1:] if size < largest), largest]


class EncoderGraphs(SupportsEncoderCudaGraph):
    """Mixin of the model; images are given as `embed_multimodal` takes them.

    Attributes:
        visual: The encoder; graphs need vLLM's.
        image_norm: The norm behind it, if there is one.
        patch_values: Normalises and cuts pixels.
        merge_size: Patches of an image token, along one side.
    """

    visual: nn.Module
    image_norm: nn.Module | None
    patch_values: PatchValues
    merge_size: int

    def encode_patches(self, patches: torch.Tensor, grids: list[list[int]] | None, **options: Any) -> torch.Tensor:
        """Run the vision encoder, and the norm behind it: (sum of P, 1176) -> (sum of N, C)."""
        images = self.visual(patches, grids, **options)
        return images if self.image_norm is None else self.image_norm(images)

    def encoder_eager_forward(self, mm_kwargs: dict[str, Any], path: str = "default") -> torch.Tensor:
        """Return the tokens of all images, (sum of N, C), without a graph."""
        return self.encode_patches(self._patches(mm_kwargs), mm_kwargs["image_grid_thw"].tolist())

    def get_encoder_cudagraph_config(self) -> EncoderCudaGraphConfig:
        """Return the names of a graph's buffers, and how they are filled beyond a batch."""
        return replace(self._vllm_model.get_encoder_cudagraph_config(self._encoder_alone), modalities=["image"])

    def get_encoder_cudagraph_budget_range(self, vllm_config: "VllmConfig") -> tuple[int, int]:
        """Return the image tokens of the smallest and of the largest graph."""
        largest = min(vllm_config.scheduler_config.max_num_encoder_input_tokens, MAX_GRAPH_TOKENS)
        return min(MIN_GRAPH_TOKENS, largest), largest

    def get_encoder_cudagraph_item_specs(self, mm_kwargs: dict[str, Any]) -> list[EncoderItemSpec]:
        """Return the patches and tokens of each image."""
        grids = mm_kwargs["image_grid_thw"]
        patches, tokens = grids.prod(-1).tolist(), image_token_counts(grids, self.merge_size)
        return [EncoderItemSpec(*sizes) for sizes in zip(patches, tokens, strict=True)]

    def select_encoder_cudagraph_items(self, mm_kwargs: dict[str, Any], indices: list[int]) -> dict[str, Any]:
        """Return some of the images, in this order."""
        grids, pixels = mm_kwargs["image_grid_thw"], mm_kwargs["pixel_values"]
        images = pixels.split(grids.prod(-1).tolist())
        chosen = [images[index] for index in indices]
        return {"pixel_values": torch.cat(chosen) if chosen else pixels[:0], "image_grid_thw": grids[indices]}

    def prepare_encoder_cudagraph_capture_inputs(self, *sizes: Any, **options: Any) -> EncoderCudaGraphCaptureInputs:
        """Return the buffers of one graph; the arguments are vLLM's."""
        return self._vllm_model.prepare_encoder_cudagraph_capture_inputs(self._encoder_alone, *sizes, **options)

    def prepare_encoder_cudagraph_replay_buffers(
        self, mm_kwargs: dict[str, Any], max_batch_size: int, max_frames_per_batch: int, path: str = "default"
    ) -> EncoderCudaGraphReplayBuffers:
        """Return what a batch puts into a graph's buffers."""
        metadata = self.visual.prepare_encoder_metadata(
            mm_kwargs["image_grid_thw"].tolist(), max_batch_size=max_batch_size
        )
        return EncoderCudaGraphReplayBuffers({**metadata, "pixel_values": self._patches(mm_kwargs)})

    def encoder_cudagraph_forward(self, values: dict[str, torch.Tensor], path: str = "default") -> torch.Tensor:
        """Return the tokens of all images from a graph's buffers; this is what is captured."""
        metadata = dict(values)
        return self.encode_patches(metadata.pop("pixel_values"), None, encoder_metadata=metadata)

    def _patches(self, mm_kwargs: dict[str, Any]) -> torch.Tensor:
        return self.patch_values(mm_kwargs["pixel_values"], mm_kwargs["image_grid_thw"], self.visual.dtype)

    @property
    def _vllm_model(self) -> type:
        # Its module needs torchvision, which a machine without a GPU may lack.
        from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

        return Qwen2_5_VLForConditionalGeneration

    @property
    def _encoder_alone(self) -> SimpleNamespace:
        """All that vLLM's methods ask of their model; there are no videos."""
        return SimpleNamespace(
            visual=self.visual, is_multimodal_pruning_enabled=False, get_max_frames_per_video=lambda: 1
        )
