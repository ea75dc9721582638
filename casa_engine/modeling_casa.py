"""The eager CASA model: the reference that every other path is compared with.

    pixels -> vision encoder -> image tokens --(k, v of each CA layer)--+
    token ids -> embeddings -> [ x + SA(norm x) + CA(norm x); + MLP ] x L -> norm -> logits

The vision encoder, norms and MLPs are those of transformers; the attention is written out, because CA needs
self-attention's projections (shared weights) and keys that no stock cache holds.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from casa_engine.attention import CasaProjections, masked_attention
from casa_engine.cache import CasaCache, check_cache
from casa_engine.cache_argument import output_with_cache, pop_cache
from casa_engine.call_inputs import CallInputs, check_inputs, check_labels, check_logits_to_keep
from casa_engine.configuration import CasaConfig
from casa_engine.generation import CasaGenerationMixin
from casa_engine.json_files import read_object
from casa_engine.rope import (
    axes_rotary_tables,
    insertion_positions,
    rotary_tables,
    rotate,
)
from casa_engine.tensor_map import mapped_weights, read_tensor_map
from casa_engine.untrusted_folder import check_no_code
from casa_engine.view_folder import is_view
from casa_engine.window_batch import WindowBatch, build_window_batch


@dataclass(frozen=True)
class LayerInputs:
    """What every decoder layer of one forward call reads besides the hidden states.

    Attributes:
        text_rope: cos, sin of self-attention, each (B, 1, T, D).
        causal_mask: bool (B, T, S) of self-attention.
        windows: The window plan; None for `insertion`.
        images: (B, N, C) vision output of the new images, padded; None without new images.
        window_rope: cos, sin of the text in CA (relative to the window), each (B, 1, T, D); None unless `ca_tv`.
        image_rope: cos, sin of the new image tokens, each (B, 1, N, D); None unless `ca_tv` with new images.
        cache: None when nothing is to be kept.
        attend: Attention under a boolean mask, as `masked_attention` defines it; an exported graph writes it
            in other operations.
    """

    text_rope: tuple[Tensor, Tensor]
    causal_mask: Tensor
    windows: WindowBatch | None
    images: Tensor | None
    window_rope: tuple[Tensor, Tensor] | None
    image_rope: tuple[Tensor, Tensor] | None
    cache: CasaCache | None
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = masked_attention


class CasaDecoderLayer(nn.Module):
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

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """Runs the layer on hidden states (B, T, C). Mutates `inputs.cache`."""
        h = self.input_layernorm(x)
        if self.has_sa:
            x = x + self._self_attention(h, inputs)
        if self.has_ca:
            x = x + self._cross_attention(h, inputs)
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

    def _cross_attention(self, h: Tensor, inputs: LayerInputs) -> Tensor:
        """Computes CA (Eq. 2) or CA_t+v (Eq. 4): keys are the image tokens of the window, then its text."""
        project = self.cross_attn or self.self_attn
        query, mask = project.query(h), inputs.windows.image_mask
        key, value = self._window_key_value(inputs)
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
        """Computes this layer's CA keys and values of image tokens.

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

    def _window_key_value(self, inputs: LayerInputs) -> tuple[Tensor | None, Tensor | None]:
        key = value = None
        if inputs.images is not None:
            key, value = self.image_key_value(inputs.images, inputs.image_rope)
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


class CasaPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = CasaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["CasaDecoderLayer"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike | None, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As transformers' own; weights of other names are read through the folder's tensor map, where it has one.

        Raises:
            CheckpointError: A configuration of the folder names code.
        """
        folder = pretrained_model_name_or_path
        if folder is not None and isinstance(config, CasaConfig) and _is_read_by_view(folder, config):
            folder = config.name_or_path
        if folder is not None and Path(folder).is_dir():
            check_no_code(Path(folder))
        tensor_map = None if folder is None else read_tensor_map(folder)
        if tensor_map is None:
            # Never pickles; `Trainer` leaves some beside the weights, so that they are not refused here.
            return super().from_pretrained(folder, *args, config=config, **{"use_safetensors": True, **kwargs})
        config = CasaConfig.from_pretrained(folder) if config is None else config
        tensors = dict(mapped_weights(folder, tensor_map))
        loaded = super().from_pretrained(None, *args, config=config, state_dict=tensors, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with what was loaded, where that is asked for
        model.config.name_or_path = str(folder)
        if (Path(folder) / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return loaded


def _is_read_by_view(folder: str | PathLike, config: CasaConfig) -> bool:
    """Whether a folder is an original whose configuration AutoModel has read, which is that of its view."""
    path = Path(folder) / CONFIG_NAME
    is_original = path.is_file() and read_object(path).get("model_type") != CasaConfig.model_type
    return is_original and is_view(Path(config.name_or_path))


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
        """Runs the vision encoder, and the norm behind it where there is one.

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
        input_ids: Tensor,
        cache: CasaCache | None = None,
        device: torch.device | None = None,
        **inputs: Tensor | None,
    ) -> CallInputs:
        """Checks a call's inputs as `forward` does; see `casa_engine.call_inputs.check_inputs`. Changes nothing.

        Args:
            input_ids: int64 (B, T).
            cache: That goes on with them.
            device: Where they should lie; the model's where not given.
            **inputs: The rest.
        """
        check_cache(cache)
        cached = None if cache is None else cache.key_positions
        return check_inputs(self.config, device or self.device, input_ids, cached_positions=cached, **inputs)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        insertion_points: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: CasaCache | None = None,
        image_embeds: Tensor | None = None,
    ) -> Tensor:
        """Computes the hidden states of the new tokens.

        Args:
            input_ids: int64 (B, T). In the CA fusions the text stream, without image markers.
            pixel_values: (P, 1176). Patches of all new images.
            image_grid_thw: int64 (I, 3). Temporal, height, width of each image in patches; images ordered by row.
            insertion_points: int64 (B, M), -1 behind the points of rows with fewer images. CA fusions: how many of
                this call's real tokens of the row precede each image. (M,) for one row.
            attention_mask: int64 (B, T) or (B, past + T); 0 for padding, on either side of the text.
            past_key_values: Continues these conversations. Mutated; as it was if the call raises.
            image_embeds: (sum of N, C). Instead of `pixel_values`: output of `encode_images`.

        Returns:
            (B, T, C).

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
        )
        if pixel_values is not None:
            image_embeds = self.encode_images(pixel_values, image_grid_thw.to(pixel_values.device))
        with nullcontext() if cache is None else cache.transaction():
            return self._decode(input_ids.long(), inputs, image_embeds, cache)

    def _decode(self, ids: Tensor, inputs: CallInputs, image_embeds: Tensor | None, cache: CasaCache | None) -> Tensor:
        """Computes the hidden states (B, T, C) of a checked call. Mutates the cache."""
        positions = inputs.positions
        key_positions = positions if cache is None else cache.append_text(positions, ids)
        causal = (key_positions[:, None] >= 0) & (key_positions[:, None] <= positions[..., None])
        x = self.language_model.embed_tokens(ids)
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
        layer_inputs = LayerInputs(_with_heads(text_rope), causal, windows, images, window_rope, image_rope, cache)
        for layer in self.language_model.layers:
            x = layer(x, layer_inputs)
        if cache is not None and inputs.images.counts:
            num_seen = zip(inputs.images.points, inputs.num_seen, strict=True)
            cache.append_points([[point + seen for point in points] for points, seen in num_seen])
            if windows is not None:
                cache.token_images = windows.kept_images.masked_fill(windows.kept < 0, -1)
                cache.insertion_points = windows.kept_points
        return self.language_model.norm(x)

    def _insertion_positions(self, ids: Tensor, inputs: CallInputs, cache: CasaCache | None) -> Tensor:
        """Returns the rotary positions of an insertion stream, int64 (3, B, T). Mutates `cache.next_rope`."""
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
    """Adds the axis of heads: (B, T, D) -> (B, 1, T, D)."""
    return tables[0][:, None], tables[1][:, None]


class CasaForConditionalGeneration(CasaPreTrainedModel, CasaGenerationMixin):
    """CASA with its output layer; `generate` takes what `CasaProcessor` returns."""

    # Assisted generation takes back what it guessed; images of earlier windows do not come back.
    _is_stateful = True
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

    def forward(
        self,
        input_ids: Tensor,
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
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Computes the logits of the new tokens; see `CasaModel.forward` for the other inputs.

        Args:
            position_ids: Taken because `generate` passes it, and ignored: positions follow from `attention_mask`.
            cache: Another name of `past_key_values`: that of transformers from 5.24 on.
            labels: int64 (B, T). Adds the loss of predicting each next label; -100 is not counted.
            use_cache: Starts a `CasaCache` where none is given.
            logits_to_keep: Only the last so many positions; 0 for all.
            return_dict: Only True; `generate` passes it.

        Returns:
            logits (B, T, vocabulary), the loss with `labels`, and the cache.

        Raises:
            InputError: As `CasaModel.forward`; or labels of another shape than `input_ids`.
        """
        cache = pop_cache({"past_key_values": past_key_values, "cache": cache})
        check_logits_to_keep(logits_to_keep)
        if labels is not None:
            check_labels(labels, input_ids, self.config.text_config.vocab_size)
        if cache is None and use_cache:
            cache = CasaCache(self.config)
        hidden = self.model(
            input_ids,
            pixel_values,
            image_grid_thw,
            insertion_points,
            attention_mask,
            cache,
            image_embeds,
        )
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return output_with_cache(logits, cache, loss)

    def new_cache(self) -> CasaCache:
        """Returns an empty cache, for conversations fed piece by piece (`CasaStream`)."""
        return CasaCache(self.config)
