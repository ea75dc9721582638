"""The eager CASA model: the reference that every other path is compared with.

    pixels -> vision encoder -> image tokens --(k, v of each CA layer)--+
    token ids -> embeddings -> [ x + SA(norm x) + CA(norm x); + MLP ] x L -> norm -> logits

The vision encoder, norms and MLPs are those of transformers; the attention is written out, because CA needs
self-attention's projections (shared weights) and keys that no stock cache holds.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.utils import TransformersKwargs, can_return_tuple

from casa_engine.attention import CasaProjections, masked_attention
from casa_engine.cache import CasaCache, check_cache
from casa_engine.cache_argument import output_with_cache, pop_cache
from casa_engine.call_inputs import CallInputs, check_inputs
from casa_engine.call_options import check_labels, check_logits_to_keep, check_options, check_position_ids
from casa_engine.configuration import CasaConfig
from casa_engine.errors import InputError
from casa_engine.generation import CasaGenerationMixin
from casa_engine.guarded_loading import GuardedModel
from casa_engine.rope import (
    axes_rotary_tables,
    insertion_positions,
    rotary_tables,
    rotate,
)
from casa_engine.window_batch import WindowBatch, build_window_batch


@dataclass(frozen=True)
class LayerInputs:
    """What every decoder layer of one forward call reads besides the hidden states.

    Attributes:
        text_rope: cos, sin of self-attention, each (B, 1, T, D).
        causal_mask: bool (B, T, S) of self-attention.
        windows: The window plan; None for `insertion`.
        window_rope: cos, sin of the text in CA (relative to the window), each (B, 1, T, D); None unless `ca_tv`.
        image_rope: cos, sin of the new image tokens, each (B, 1, N, D); None unless `ca_tv` with new images.
        cache: None when nothing is to be kept.
        attend: Attention under a boolean mask, as `masked_attention` defines it; an exported graph writes it
            in other operations.
    """

    text_rope: tuple[Tensor, Tensor]
    causal_mask: Tensor
    windows: WindowBatch | None
    window_rope: tuple[Tensor, Tensor] | None
    image_rope: tuple[Tensor, Tensor] | None
    cache: CasaCache | None
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = masked_attention


class CasaDecoderLayer(GradientCheckpointingLayer):
    """`x += SA(h) + CA(h); x += MLP(norm(x))` with `h = norm(x)`; either attention may be absent."""

    def __init__(self, config: CasaConfig, layer: int) -> None:
        super().__init__()
        text, backbone = config.text_config, config.backbone
        self.layer, self.fusion = layer, config.fusion
        self.normalize_image_tokens = config.normalize_image_tokens
        self.has_ca, self.has_sa = config.has_ca(layer), config.has_sa(layer)
        self.self_attn = CasaProjections(config) if self.has_sa else None
        self.cross_attn = CasaProjections(config) if self.has_ca and config.ca_weights == "own" else None
        self.mlp = backbone.mlp_class(text)
        self.input_layernorm = backbone.norm_class(text.hidden_size, eps=text.rms_norm_eps)
        self.post_attention_layernorm = backbone.norm_class(text.hidden_size, eps=text.rms_norm_eps)

    def forward(self, x: Tensor, inputs: LayerInputs, images: Tensor | None = None) -> Tensor:
        """Run the layer. Mutates `inputs.cache`.

        Args:
            x: (B, T, C). Hidden states.
            inputs: The rest of the call.
            images: (B, N, C). Vision output of the new images, padded; None without new images. Apart from `inputs`,
                since a checkpoint that is reentrant passes gradients to positional tensors only.
        """
        h = self.input_layernorm(x)
        if self.has_sa:
            x = x + self._self_attention(h, inputs)
        if self.has_ca:
            x = x + self._cross_attention(h, inputs, images)
        return x + self.mlp(self.post_attention_layernorm(x))

    def _self_attention(self, h: Tensor, inputs: LayerInputs) -> Tensor:
        key, value = self.self_attn.key_value(h)
        query, key = (
            rotate(self.self_attn.query(h), *inputs.text_rope),
            rotate(key, *inputs.text_rope),
        )
        if inputs.cache is not None:
            key, value = inputs.cache.update(key, value, self.layer)
        return self.self_attn.o_proj(inputs.attend(query, key, value, inputs.causal_mask))

    def _cross_attention(self, h: Tensor, inputs: LayerInputs, images: Tensor | None) -> Tensor:
        """Compute CA (Eq. 2) or CA_t+v (Eq. 4): keys are the image tokens of the window, then its text."""
        project = self.cross_attn or self.self_attn
        query, mask = project.query(h), inputs.windows.image_mask
        key, value = self._window_key_value(inputs, images)
        if self.fusion == "ca_tv":
            query = rotate(query, *inputs.window_rope)
            text_key, text_value = project.key_value(h)
            text_key = rotate(text_key, *inputs.window_rope)
            if inputs.cache is not None:
                text_key, text_value = inputs.cache.ca_text[self.layer].update(text_key, text_value)
            mask = torch.cat([mask, inputs.windows.text_mask], dim=-1)
            key = text_key if key is None else torch.cat([key, text_key], dim=2)
            value = text_value if value is None else torch.cat([value, text_value], dim=2)
        if key is None:  # no image in any row: CA contributes exactly zero, without the output bias
            return torch.zeros_like(h)
        output = project.o_proj(inputs.attend(query, key, value, mask))
        # A sum, since exported graphs come here with no key at all, and the largest of none is undefined in ONNX.
        return output * (mask.sum(dim=-1, keepdim=True) > 0)

    def image_key_value(self, images: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Compute this layer's CA keys and values of image tokens.

        Args:
            images: (B, N, C). Vision output.
            rope: cos, sin of the image tokens, each (B, 1, N, D); None for `ca`.

        Returns:
            Two (B, Hkv, N, D).
        """
        if self.normalize_image_tokens:
            images = self.input_layernorm(images)
        key, value = (self.cross_attn or self.self_attn).key_value(images)
        return (key if rope is None else rotate(key, *rope)), value

    def _window_key_value(self, inputs: LayerInputs, images: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        key = value = None
        if images is not None:
            key, value = self.image_key_value(images, inputs.image_rope)
        if inputs.cache is not None:
            key, value = inputs.cache.with_window(self.layer, key, value)
            if inputs.windows.kept is not None:
                inputs.cache.keep_window(self.layer, key, value, inputs.windows.kept)
        return key, value


class CasaTextModel(nn.Module):
    """Embeddings, decoder layers and final norm."""

    def __init__(self, config: CasaConfig) -> None:
        super().__init__()
        text, backbone = config.text_config, config.backbone
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(CasaDecoderLayer(config, layer) for layer in range(text.num_hidden_layers))
        self.norm = backbone.norm_class(text.hidden_size, eps=text.rms_norm_eps)
        self.rotary_emb = backbone.rotary_class(text)


class CasaPreTrainedModel(GuardedModel, PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = CasaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["CasaDecoderLayer"]


class CasaModel(CasaPreTrainedModel):
    """Vision encoder and decoder, without the output layer."""

    def __init__(self, config: CasaConfig) -> None:
        super().__init__(config)
        self.visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config)
        text = config.text_config
        norm = config.backbone.norm_class
        self.image_norm = norm(text.hidden_size, eps=text.rms_norm_eps) if config.image_norm else None
        self.language_model = CasaTextModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Accessor that transformers calls."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Accessor that transformers calls."""
        self.language_model.embed_tokens = value

    def encode_images(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Run the vision encoder, and the norm behind it where there is one.

        Args:
            pixel_values: (P, 1176). Patches of all images.
            image_grid_thw: int64 (I, 3).

        Returns:
            (sum of N, C): the image tokens of all images, in order.
        """
        images = self.visual(pixel_values.to(self.visual.dtype), grid_thw=image_grid_thw).pooler_output
        return images if self.image_norm is None else self.image_norm(images)

    def check_inputs(
        self,
        input_ids: Tensor | None,
        cache: CasaCache | None = None,
        device: torch.device | None = None,
        **inputs: Tensor | None,
    ) -> CallInputs:
        """Check a call's inputs as `forward` does; see `casa_engine.call_inputs.check_inputs`. Change nothing.

        Args:
            input_ids: int64 (B, T); None with `inputs_embeds`.
            cache: That goes on with them.
            device: Where they should lie; the model's where not given.
            **inputs: The rest.
        """
        check_cache(cache)
        cached = None if cache is None else cache.key_positions
        if inputs.get("inputs_embeds") is not None:
            inputs["image_token_embedding"] = self.get_input_embeddings().weight[self.config.image_token_id]
        return check_inputs(self.config, device or self.device, input_ids, cached_positions=cached, **inputs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        insertion_points: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: CasaCache | None = None,
        image_embeds: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        """Compute the hidden states of the new tokens.

        Args:
            input_ids: int64 (B, T). In the CA fusions the text stream, without image markers.
            pixel_values: (P, 1176). Patches of all new images.
            image_grid_thw: int64 (I, 3). Temporal, height, width of each image in patches; images ordered by row.
            insertion_points: int64 (B, M), -1 behind the points of rows with fewer images. CA fusions: how many of
                this call's real tokens of the row precede each image. (M,) for one row.
            attention_mask: int64 (B, T) or (B, past + T); 0 for padding, on either side of the text.
            past_key_values: Continues these conversations. Mutated; as it was if the call raises.
            image_embeds: (sum of N, C). Instead of `pixel_values`: output of `encode_images`.
            inputs_embeds: (B, T, C). Instead of `input_ids`: the text's embeddings.
            position_ids: int64 (B, T). Only what follows from `attention_mask` anyway.
            output_hidden_states: Whether to return those between the layers too.

        Returns:
            The last hidden states (B, T, C); with `output_hidden_states` also L + 1 of them: the embeddings and each
            layer's, the last one behind the norm.

        Raises:
            InputError: An input is of the wrong kind, or images, insertion points and rows do not fit together.
        """
        cache = past_key_values
        inputs = self.check_inputs(
            input_ids,
            cache,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            insertion_points=insertion_points,
            image_embeds=image_embeds,
            inputs_embeds=inputs_embeds,
        )
        if position_ids is not None:
            check_position_ids(position_ids, inputs)
        if cache is not None and self.recomputes_activations:
            raise InputError(
                "got a cache while gradient checkpointing runs each layer twice; leave it out, or call model.eval()."
            )
        if pixel_values is not None:
            image_embeds = self.encode_images(pixel_values, image_grid_thw.to(pixel_values.device))
        if inputs_embeds is None:
            inputs_embeds = self.language_model.embed_tokens(inputs.ids)
        with nullcontext() if cache is None else cache.transaction():
            between: list[Tensor] | None = [] if output_hidden_states else None
            last = self._decode(inputs_embeds, inputs, image_embeds, cache, between)
        return BaseModelOutput(last, None if between is None else (*between, last))

    @property
    def recomputes_activations(self) -> bool:
        """Whether the backward pass of a call made now would run some layers again."""
        layers = self.language_model.layers
        return self.training and torch.is_grad_enabled() and any(layer.gradient_checkpointing for layer in layers)

    def _decode(
        self,
        x: Tensor,
        inputs: CallInputs,
        image_embeds: Tensor | None,
        cache: CasaCache | None,
        between: list[Tensor] | None,
    ) -> Tensor:
        """Compute the last hidden states (B, T, C) of a checked call. Mutates the cache.

        Args:
            x: (B, T, C). The text's embeddings.
            inputs: The call.
            image_embeds: (sum of N, C). None without new images.
            cache: None when nothing is to be kept.
            between: Filled with what each of the L layers reads; with None no layer's input outlives the layer.
        """
        ids, positions = inputs.ids, inputs.positions
        key_positions = positions if cache is None else cache.append_text(positions, ids)
        causal = (key_positions[:, None] >= 0) & (key_positions[:, None] <= positions[..., None])
        inv_freq, mrope_section = self.language_model.rotary_emb.inv_freq.float(), self.config.mrope_section
        windows = images = window_rope = image_rope = None
        if self.config.is_cross_attention:
            windows = build_window_batch(self.config, inputs, key_positions, cache)
            if image_embeds is not None:
                images = image_embeds[windows.gather.clamp(min=0)].to(x.dtype)
            if self.config.sees_window_text:
                window_rope = _with_heads(rotary_tables(windows.relative, inv_freq))
                if images is not None:
                    image_rope = _with_heads(axes_rotary_tables(windows.image_rope, inv_freq, mrope_section))
            text_rope = rotary_tables(positions.clamp(min=0), inv_freq)
        else:
            if image_embeds is not None:
                where = (inputs.real & (ids == self.config.image_token_id))[..., None].expand_as(x)
                x = x.masked_scatter(where, image_embeds.to(x.dtype))
            text_rope = axes_rotary_tables(self._insertion_positions(ids, inputs, cache), inv_freq, mrope_section)
        layer_inputs = LayerInputs(_with_heads(text_rope), causal, windows, window_rope, image_rope, cache)
        for layer in self.language_model.layers:
            if between is not None:
                between.append(x)
            x = layer(x, layer_inputs, images)
        if cache is not None and inputs.images.counts:
            num_seen = zip(inputs.images.points, inputs.num_seen, strict=True)
            cache.append_points([[point + seen for point in points] for points, seen in num_seen])
            if windows is not None:
                cache.token_images = windows.kept_images.masked_fill(windows.kept < 0, -1)
                cache.insertion_points = windows.kept_points
        return self.language_model.norm(x)

    def _insertion_positions(self, ids: Tensor, inputs: CallInputs, cache: CasaCache | None) -> Tensor:
        """Return the rotary positions of an insertion stream, int64 (3, B, T). Mutates `cache.next_rope`."""
        positions = torch.zeros(3, *ids.shape, dtype=torch.long)
        following = []
        for row, images in enumerate(inputs.images.by_row):
            start = 0 if cache is None or cache.next_rope is None else int(cache.next_rope[row])
            real, grids = inputs.real[row].cpu(), inputs.images.grids[images]
            positions[:, row, real], after = insertion_positions(
                ids[row].cpu()[real].tolist(), grids, self.config, start
            )
            following.append(after)
        if cache is not None:
            cache.next_rope = torch.tensor(following)
        return positions.to(ids.device)


def _with_heads(tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Add the axis of heads: (B, T, D) -> (B, 1, T, D)."""
    return tables[0][:, None], tables[1][:, None]


class CasaForConditionalGeneration(CasaPreTrainedModel, CasaGenerationMixin):
    """CASA with its output layer; `generate` takes what `CasaProcessor` returns."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: CasaConfig) -> None:
        super().__init__(config)
        self.model = CasaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Accessor that transformers calls."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Accessor that transformers calls."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Accessor that transformers calls."""
        return self.lm_head

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        insertion_points: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: CasaCache | None = None,
        cache: CasaCache | None = None,
        image_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Compute the logits of the new tokens; see `CasaModel.forward` for the other inputs.

        Args:
            cache: Another name of `past_key_values`: that of transformers from 5.24 on.
            labels: int64 (B, T). Adds the loss of predicting each next label; -100 is not counted.
            use_cache: Starts a `CasaCache` where none is given; not while gradient checkpointing needs none.
            logits_to_keep: Only the last so many positions; 0 for all.
            output_hidden_states: Returns those between the layers too; the configuration's choice where not given.
            **kwargs: Those of transformers' own models: `num_items_in_batch`, by which the loss is divided (Trainer
                gives it), and others of which only the value that changes nothing is taken.

        Returns:
            logits (B, T, vocabulary), the loss with `labels`, the cache and, if asked for, the hidden states; a tuple
            with `return_dict=False`.

        Raises:
            InputError: As `CasaModel.forward`; labels of another shape than the text; an argument that is not taken.
        """
        cache = pop_cache({"past_key_values": past_key_values, "cache": cache})
        check_options(kwargs)
        check_logits_to_keep(logits_to_keep)
        if labels is not None:
            check_labels(labels, inputs_embeds if input_ids is None else input_ids, self.config, logits_to_keep)
        if cache is None and use_cache and not self.model.recomputes_activations:
            cache = CasaCache(self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs = self.model(
            input_ids,
            pixel_values,
            image_grid_thw,
            insertion_points,
            attention_mask,
            cache,
            image_embeds,
            inputs_embeds,
            position_ids,
            output_hidden_states,
        )
        hidden = outputs.last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels.long(), logits.shape[-1], num_items_in_batch=kwargs.get("num_items_in_batch")
            )
        return output_with_cache(logits, cache, loss, outputs.hidden_states)

    def new_cache(self) -> CasaCache:
        """Return an empty cache, for conversations fed piece by piece (`CasaStream`)."""
        return CasaCache(self.config)
