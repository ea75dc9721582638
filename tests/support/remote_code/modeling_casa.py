"""CASA by its published equation, on the parts that transformers 4.51 has of its own; nothing of casa-engine.

A synthetic original brings this as its remote code, under the names that the engine's tables call unverified, and is
called as the public scripts call the published models. Parallel cross-attention (`ca`), each layer with weights of its
own: what a token adds is attention to all tokens of the latest image before it, without positions, and nothing where
there is none.
"""

from types import SimpleNamespace

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from .configuration_casa import Config

TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


class CrossAttention:
    """Beside the self-attention that it is mixed into: cross-attention to the image."""

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        for name in "qkvo":
            linear = getattr(self, f"{name}_proj")
            ours = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
            setattr(self, f"{name}_proj_casa", ours)
        self.images, self.point = None, None

    def forward(self, hidden_states, *args, **kwargs):
        output, *rest = super().forward(hidden_states, *args, **kwargs)
        if self.images is not None:
            output = output.clone()
            output[:, self.point :] += self._cross(hidden_states[:, self.point :])
        return output, *rest

    def _cross(self, text):
        """(1, T, C) of text behind an image -> what the image adds to it."""

        def heads(x):
            return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

        query, groups = heads(self.q_proj_casa(text)), self.num_key_value_groups
        key = heads(self.k_proj_casa(self.images)).repeat_interleave(groups, 1)
        value = heads(self.v_proj_casa(self.images)).repeat_interleave(groups, 1)
        weights = (query @ key.transpose(2, 3) * self.head_dim**-0.5).softmax(-1)
        return self.o_proj_casa((weights @ value).transpose(1, 2).flatten(2))


class HeliumAttention(CrossAttention, LlamaAttention):
    """Of Helium's layers."""


class QwenAttention(CrossAttention, Qwen2Attention):
    """Of Qwen's layers. Text alone has one position on all axes of M-RoPE, which is then plain RoPE."""


class Model(PreTrainedModel):
    """The whole model."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        is_qwen = hasattr(config, "rope_scaling")
        classes = (Qwen2Config, Qwen2ForCausalLM) if is_qwen else (LlamaConfig, LlamaForCausalLM)
        fields = {name: getattr(config, name) for name in TEXT_FIELDS}
        text = classes[0](num_hidden_layers=config.n_layers, rope_theta=config.rope_base, **fields)
        text._attn_implementation = "eager"
        decoder = classes[1](text)
        for number, layer in enumerate(decoder.model.layers):
            layer.self_attn = (QwenAttention if is_qwen else HeliumAttention)(text, number)
        self.model, self.lm_head = decoder.model, decoder.lm_head
        vision = Qwen2_5_VLVisionConfig(**config.vision_config)
        vision._attn_implementation = "eager"
        self.image_prefix = nn.Module()
        encoder = self.image_prefix
        if not is_qwen:
            encoder = self.image_prefix.enc = nn.Module()
        encoder.visual = Qwen2_5_VisionTransformerPretrainedModel(vision)
        self._encoder = [encoder.visual]  # in a list: no second name for its weights
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask, use_cache, pixel_values=None, image_embeds_insertion_points=None):
        images, point = None, None
        if pixel_values is not None:
            (frame,), (point,) = pixel_values, image_embeds_insertion_points[0].tolist()
            images = self._encode(frame)[None]
        for layer in self.model.layers:
            normed = images is not None and self.config.xa_norm_on_images
            layer.self_attn.images = layer.input_layernorm(images) if normed else images
            layer.self_attn.point = point
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)[0]
        return SimpleNamespace(logits=self.lm_head(hidden))

    def _encode(self, frame):
        """(rows, columns, 588) patches -> (N, C): two equal frames, patches of a 2x2 block behind each other."""
        rows, columns, _ = frame.shape
        blocks = frame.view(rows // 2, 2, columns // 2, 2, 3, 14 * 14).permute(0, 2, 1, 3, 4, 5)
        patches = torch.stack((blocks, blocks), dim=5).reshape(rows * columns, -1)
        return self._encoder[0](patches, grid_thw=torch.tensor([[1, rows, columns]]))
