"""The CASA model in vLLM.

    embed -> [ x + SA(norm x) + CA(norm x); + MLP(norm x) ] x L -> norm -> logits

Parameter names are those of the checkpoint. Vision encoder, linears, norms and MLPs are vLLM's;
CA is in cross_attention.py. With fusion `insertion` there is no CA and the model is an ordinary
multimodal model of vLLM's.
"""

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import extract_layer_index
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sequence import IntermediateTensors
from vllm.triton_utils import HAS_TRITON
from vllm.utils.torch_utils import async_tensor_h2d, set_default_torch_dtype

from casa_engine.configuration import CasaConfig
from casa_engine.image_patches import PatchValues
from casa_engine.rope import (
    axes_rotary_tables,
    image_positions,
    image_token_counts,
    insertion_positions,
    rotates_images,
)
from casa_engine.tensor_map import read_tensor_map
from casa_vllm.cross_attention import CrossAttention
from casa_vllm.encoder_graphs import EncoderGraphs
from casa_vllm.exit_messages import close_error_output_at_exit
from casa_vllm.image_cache_spec import ImageLimits
from casa_vllm.image_keys import StackedImageKeys
from casa_vllm.joint_projections import JointProjections, joins_attentions
from casa_vllm.processing import CasaDummyInputs, CasaMultiModalProcessor, CasaProcessingInfo
from casa_vllm.projections import AttentionProjections, needs_queries_apart, norm_heads
from casa_vllm.stacked_linears import StackedLinears, can_stack_weights
from casa_vllm.vision import vision_encoder
from casa_vllm.weights import load_stacked, load_strictly

logger = logging.getLogger("vllm.casa_images")


class SelfAttention(AttentionProjections):
    """Self-attention over the text stream, before the sum over ranks."""

    def __init__(self, config: CasaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(config, vllm_config, prefix)
        self.rotary_emb = _rotary_embedding(config, vllm_config)
        self.attn = Attention(
            self.num_heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def attend(self, positions: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        """Compute (T, (H + 2 Hkv) D) projections -> (T, H D). May rotate `qkv` in place."""
        query, key, value = self.split(qkv)
        query, key = norm_heads(query, self.q_norm), norm_heads(key, self.k_norm)
        query, key = self.rotary_emb(positions, query, key)
        return self.attn(query, key, value)


class CasaDecoderLayer(nn.Module):
    """One block; either attention may be absent."""

    def __init__(self, config: CasaConfig, vllm_config: VllmConfig, limits: ImageLimits, prefix: str) -> None:
        super().__init__()
        text, layer = config.text_config, extract_layer_index(prefix)
        self.hidden_size = text.hidden_size
        self.normalize_image_tokens = config.normalize_image_tokens
        self.reduces = not config.output_bias and get_tensor_model_parallel_world_size() > 1
        self.input_layernorm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.mlp = LlamaMLP(
            text.hidden_size,
            text.intermediate_size,
            text.hidden_act,
            quant_config=vllm_config.quant_config,
            bias=config.mlp_bias,
            prefix=f"{prefix}.mlp",
        )
        self.self_attn = self.cross_attn = None
        if config.has_sa(layer):
            self.self_attn = SelfAttention(config, vllm_config, f"{prefix}.self_attn")
        if config.has_ca(layer):
            self.cross_attn = self._cross_attention(config, vllm_config, limits, f"{prefix}.cross_attn")

    def _cross_attention(
        self, config: CasaConfig, vllm_config: VllmConfig, limits: ImageLimits, prefix: str
    ) -> CrossAttention:
        return CrossAttention(
            config,
            vllm_config,
            shared=self.self_attn if config.ca_weights == "shared" else None,
            limits=limits,
            rotary_emb=_rotary_embedding(config, vllm_config),
            inv_freq=config.backbone.rotary_class(config.text_config).inv_freq.float(),
            prefix=prefix,
        )

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the MLP's output and the residual stream before it, from (T, C) and the stream so far."""
        if residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        attended = self.attend(positions, x)
        if self.reduces:
            attended = tensor_model_parallel_all_reduce(attended)
        x, residual = self.post_attention_layernorm(attended, residual)
        return self.mlp(x), residual

    def attend(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of both attentions, (T, C), not yet summed over ranks, from (T, C) normed hidden states."""
        own, cross = self.self_attn, self.cross_attn
        if own is None:
            return cross(x, self.hidden_size)
        if cross is not None and cross.joint is not None:
            qkv, projected = cross.joint.project(x)
            attended = cross.attend_heads(projected, own.attend(positions, qkv))
            return cross.joint.project_output(attended)
        qkv = own.qkv_proj(x)[0]
        if cross is None:
            return own.o_proj(own.attend(positions, qkv))[0]
        if cross.shares_output:
            # Before self-attention, which rotates the projections in place.
            attended = cross.attend_heads(qkv)
            return own.o_proj(own.attend(positions, qkv) + attended)[0]
        from_cross = cross(qkv if cross.is_shared else x, self.hidden_size)
        return own.o_proj(own.attend(positions, qkv))[0] + from_cross

    def write_images(self, images: torch.Tensor, rope: tuple | None, slots: torch.Tensor) -> None:
        """See `CrossAttention.write_images`; `images` is the vision encoder's output."""
        if self.normalize_image_tokens:
            images = self.input_layernorm(images)
        self.cross_attn.write_images(images, rope, slots)


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "b"},
        "positions": {-1: "b"},
        "intermediate_tensors": {0: "b"},
        "inputs_embeds": {0: "b"},
    }
)
class CasaTextModel(nn.Module):
    """Embeddings, decoder layers and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: CasaConfig = vllm_config.model_config.hf_config
        text = config.text_config
        self.embed_tokens = VocabParallelEmbedding(
            text.vocab_size, text.hidden_size, quant_config=vllm_config.quant_config
        )
        limits = MULTIMODAL_REGISTRY.create_processor(vllm_config.model_config).info.image_limits()
        self.layers = nn.ModuleList(
            CasaDecoderLayer(config, vllm_config, limits, f"{prefix}.layers.{layer}")
            for layer in range(text.num_hidden_layers)
        )
        self.norm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.has_queries_apart = needs_queries_apart(config, vllm_config)
        self.image_layers = [layer for layer in self.layers if layer.cross_attn is not None]
        self.joint = self.stacked_images = None
        if joins_attentions(config, vllm_config):
            self.joint = JointProjections(
                [(layer.self_attn, layer.cross_attn.projections) for layer in self.image_layers]
            )
            for layer, joint in zip(self.image_layers, self.joint.layers, strict=True):
                layer.cross_attn.joint = joint
        if HAS_TRITON and self.image_layers and can_stack_weights(vllm_config):
            norms = [layer.input_layernorm for layer in self.image_layers] if config.normalize_image_tokens else None
            self.stacked_images = StackedImageKeys(
                [layer.cross_attn for layer in self.image_layers], norms, self._image_linears()
            )

    def _image_linears(self) -> StackedLinears:
        """Return the stacked layers of image keys; those of `ca_tv` are stacked with self-attention's already."""
        if self.joint is not None and not self.has_queries_apart:
            return self.joint.inputs
        return StackedLinears([[layer.cross_attn.projections.key_value_layer] for layer in self.image_layers])

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(T,) -> (T, C)."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Final hidden states (T, C)."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        return self.norm(x, residual)[0]

    def write_images(self, images: torch.Tensor, rope: tuple | None, slots: dict[str, torch.Tensor]) -> None:
        """Write keys and values of image tokens into the pages of all CA layers; see `StackedImageKeys.write`."""
        if self.stacked_images is not None:
            self.stacked_images.write(images, rope, slots)
            return
        for layer in self.image_layers:
            layer.write_images(images, rope, slots[layer.cross_attn.layer_name])

    def profile_images(self, images: torch.Tensor) -> None:
        """Allocate what `write_images` does for (N, C) images, before there are caches."""
        if self.stacked_images is not None:
            self.stacked_images.profile(images)
        elif self.image_layers:
            layer = self.image_layers[0]
            normed = layer.input_layernorm(images) if layer.normalize_image_tokens else images
            layer.cross_attn.projections.image_keys(normed)

    def process_weights_after_loading(self) -> None:
        """Keep the stacked weights only where the layers still compute with them."""
        stacks = [stack for stack in (self.joint, self.stacked_images) if stack is not None]
        if all(stack.is_usable for stack in stacks):
            return
        logger.warning("Weights of attentions were replaced: more and smaller matrix products, slower.")
        self.joint = self.stacked_images = None
        for layer in self.image_layers:
            layer.cross_attn.joint = None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Hook called by vLLM: stacks q, k, v and gate, up of the checkpoint."""
        return load_stacked(self, weights, has_queries_apart=self.has_queries_apart)


class CasaModel(nn.Module):
    """Vision encoder and text model, under the checkpoint's names."""


@MULTIMODAL_REGISTRY.register_processor(CasaMultiModalProcessor, info=CasaProcessingInfo, dummy_inputs=CasaDummyInputs)
class CasaForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsMRoPE, EncoderGraphs):
    """vLLM's model class for `CasaConfig`."""

    packed_modules_mapping = {  # noqa: RUF012 (vLLM's)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "kv_proj": ["k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return the placeholder for a chat template without image support."""
        if modality != "image":
            raise ValueError(f"modality is {modality!r}; CASA models take images only.")
        return "<|vision_start|><|image_pad|><|vision_end|>"

    def get_model_state_cls(self) -> type:
        """Hook called by Model Runner V2."""
        if not self.config.is_cross_attention:
            from vllm.v1.worker.gpu.model_states.default import DefaultModelState

            return DefaultModelState
        from casa_vllm.v2_model_state import CasaModelState

        return CasaModelState

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        close_error_output_at_exit()
        config: CasaConfig = vllm_config.model_config.hf_config
        self.config, self.vllm_config = config, vllm_config
        self.merge_size = config.vision_config.spatial_merge_size
        self.patch_values = _patch_values(vllm_config)
        self.model = CasaModel()
        with self._mark_tower_model(vllm_config, "image"):
            self.model.visual = vision_encoder(config.vision_config, vllm_config.quant_config, "model.visual")
        text = config.text_config
        self.model.image_norm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps) if config.image_norm else None
        self.model.language_model = CasaTextModel(vllm_config=vllm_config, prefix="model.language_model")
        self.lm_head = ParallelLMHead(
            text.vocab_size,
            text.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix="lm_head",
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.language_model.embed_tokens)
        self.logits_processor = LogitsProcessor(text.vocab_size)

    @property
    def visual(self) -> nn.Module:
        """The vision encoder."""
        return self.model.visual

    @property
    def image_norm(self) -> nn.Module | None:
        """The norm behind the vision encoder."""
        return self.model.image_norm

    def get_language_model(self) -> nn.Module:
        """Return the text model."""
        return self.model.language_model

    def embed_multimodal(self, **kwargs: object) -> Sequence[torch.Tensor]:
        """Run the vision encoder, and the norm behind it where there is one.

        Args:
            pixel_values: uint8 (P, 588): the levels of I images (see `casa_engine.image_patches`).
            image_grid_thw: int64 (I, 3), on the CPU.

        Returns:
            I tensors (N, C).
        """
        pixel_values, grids = kwargs.get("pixel_values"), kwargs.get("image_grid_thw")
        if pixel_values is None or grids is None:
            return []
        images = self.encoder_eager_forward(kwargs)
        if any(layer.cross_attn.is_unbound for layer in self.model.language_model.image_layers[:1]):
            # vLLM's memory profiling, with the most images of a step; writing their keys comes next in a step.
            self._profile_images(images, grids)
        return images.split(image_token_counts(grids, self.merge_size))

    def write_images(self, images: torch.Tensor, grids: torch.Tensor, slots: dict[str, torch.Tensor]) -> None:
        """Write keys and values of encoded images into the pages of all CA layers.

        Args:
            images: (N, C) tokens of I images, in order.
            grids: int64 (I, 3).
            slots: For each CA layer's name, its (N,) int64 cache slots.
        """
        self.model.language_model.write_images(images, self._image_rope(grids, images.device), slots)

    def _profile_images(self, images: torch.Tensor, grids: torch.Tensor) -> None:
        rope = self._image_rope(grids, images.device)
        # The runner joins the tokens of a step's images.
        self.model.language_model.profile_images(images.clone())
        del rope  # alive until here, as in a step

    def _image_rope(self, grids: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return float32 cosines and sines of I images' tokens, (N, D) each; None where rotation is the identity."""
        if not rotates_images(self.config):
            return None
        positions = torch.cat([image_positions(grid, self.config) for grid in grids], dim=1)
        return axes_rotary_tables(
            async_tensor_h2d(positions, device),
            self.inv_freq,
            getattr(self.config, "image_mrope_section", None),  # see config_hook.py
        )

    @property
    def inv_freq(self) -> torch.Tensor:
        """float32 (D / 2,): rotary frequencies of image keys."""
        return self.model.language_model.image_layers[0].cross_attn.inv_freq

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Return the M-RoPE positions of an insertion stream, (3, T), and the next text position minus T."""
        grids = [feature.data["image_grid_thw"].data for feature in mm_features]
        stacked = torch.stack(grids) if grids else torch.zeros(0, 3, dtype=torch.long)
        positions, following = insertion_positions(list(input_tokens), stacked, self.config)
        return positions.contiguous(), following - len(input_tokens)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Final hidden states (T, C)."""
        return self.model.language_model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(T, C) -> (T, vocabulary)."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint that contains exactly this model's tensors, under the names of its tensor map if any."""
        tensor_map = read_tensor_map(self.vllm_config.model_config.model)
        return load_strictly(self, self.config, weights if tensor_map is None else tensor_map.apply(weights))

    def process_weights_after_loading(self) -> None:
        """Hook called by vLLM when all layers have their weights as they will be used."""
        self.model.language_model.process_weights_after_loading()


def _patch_values(vllm_config: VllmConfig) -> PatchValues:
    """Return the table, built on the CPU in float32, whatever the device and type of the model."""
    processor = MULTIMODAL_REGISTRY.create_processor(vllm_config.model_config).info.get_hf_processor()
    with torch.device("cpu"), set_default_torch_dtype(torch.float32):
        return PatchValues(processor.image_processor)


def _rotary_embedding(config: CasaConfig, vllm_config: VllmConfig) -> nn.Module:
    """Return vLLM's rotary embedding, which vLLM caches: all layers get the same module."""
    return get_rope(
        config.head_dim,
        max_position=max(config.text_config.max_position_embeddings, vllm_config.model_config.max_model_len),
        rope_parameters=config.text_config.rope_parameters,
        is_neox_style=True,
    )
