"""The three graphs as modules that `torch.onnx.export` can follow.

They are thin: decoder layers run through `CasaDecoderLayer.forward` itself, with a cache object that hands out graph
inputs and collects graph outputs. Only two things are written again, because their usual form does not export well:
attention (grouped, so that no key is ever repeated for its query heads) and the vision encoder's windows (a gather
into a padded table instead of a split into a data-dependent number of pieces).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from casa_engine.modeling_casa import CasaForConditionalGeneration, LayerInputs
from casa_engine.rope import axes_rotary_tables, rotary_tables
from casa_engine.window_batch import WindowBatch
from casa_export.graph_spec import GraphSpec, cache_layers


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Compute softmax over the last axis in float32; a row that sees nothing comes out uniform, not as NaN.

    Args:
        scores: (..., T, S), any dtype.
        mask: bool, broadcasting to it.
    """
    scores = scores.float()
    return torch.where(mask, scores, torch.finfo(torch.float32).min).softmax(dim=-1)


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Compute `casa_engine.attention.masked_attention` in operations that every runtime has.

    The H / Hkv query heads of a key head are laid under each other as rows of one matrix product, so keys and values
    are never expanded. Lengths of zero work everywhere: nothing takes a maximum over keys but the softmax.

    Args:
        query: (B, H, T, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, D).
        mask: bool (B, T, S).

    Returns:
        (B, T, H * D).
    """
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    sees_any = mask.long().sum(dim=-1, keepdim=True) > 0
    rows = mask[:, None].repeat(1, 1, groups, 1) if groups > 1 else mask[:, None]
    query = query * query.shape[-1] ** -0.5
    stacked = query.reshape(query.shape[0], heads, -1, query.shape[-1]) if groups > 1 else query
    weights = masked_softmax(stacked @ key.transpose(2, 3), rows).to(value.dtype)
    output = (weights @ value).reshape(query.shape)
    return (output.transpose(1, 2) * sees_any[..., None]).flatten(2)


class VisionGraph(nn.Module):
    """Qwen2.5-VL's vision encoder for one image; patches keep their order throughout.

    Attention windows come in as a table of image tokens: row w of `vision_windows` lists those of window w, -1 where
    there are fewer than slots. `vision_slots` is its inverse: where in the flattened table each image token is.
    """

    def __init__(self, model: CasaForConditionalGeneration, spec: GraphSpec) -> None:
        super().__init__()
        self.visual, self.image_norm = model.model.visual, model.model.image_norm

    def forward(self, pixel_values: Tensor, patch_positions: Tensor, windows: Tensor, slots: Tensor) -> Tensor:
        """Compute the image tokens; see `graph_spec.vision_spec` for shapes."""
        visual = self.visual
        weight = visual.patch_embed.proj.weight
        # The convolution's stride is its kernel, so that it is a product with each flattened patch.
        x = linear(pixel_values.to(weight.dtype), weight.flatten(1))
        # Written out: transformers' module takes other arguments in other versions.
        angles = (patch_positions[..., None].float() * visual.rotary_pos_emb.inv_freq.float()).flatten(1).repeat(1, 2)
        rope = angles.cos(), angles.sin()
        for layer, block in enumerate(visual.blocks):
            table = None if layer in visual.fullatt_block_indexes else (windows, slots)
            x = x + self._attention(block.attn, block.norm1(x), rope, table)
            x = x + block.mlp(block.norm2(x))
        images = visual.merger(x)
        return (images if self.image_norm is None else self.image_norm(images)).float()

    def _attention(self, attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], table: Any) -> Tensor:
        """Attend over the whole image, or within each window of the table: (P, C) -> (P, C)."""
        query, key, value = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *rope)
        query = query * attn.head_dim**-0.5
        if table is None:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
            weights = (query @ key.transpose(1, 2)).float().softmax(dim=-1).to(value.dtype)
            return attn.proj((weights @ value).transpose(0, 1).flatten(1))
        windows, slots = table
        unit = self.visual.spatial_merge_unit
        # (P, H, D) -> (W, H, slots * unit, D)
        query, key, value = (
            part.reshape(-1, unit * part.shape[1] * part.shape[2])
            .index_select(0, windows.clamp(min=0).flatten())
            .reshape(windows.shape[0], -1, part.shape[1], part.shape[2])
            .transpose(1, 2)
            for part in (query, key, value)
        )
        real = (windows >= 0)[..., None].expand(-1, -1, unit).flatten(1)
        weights = masked_softmax(query @ key.transpose(2, 3), real[:, None, None]).to(value.dtype)
        output = (weights @ value).transpose(1, 2).flatten(2)
        return attn.proj(output.reshape(-1, unit * output.shape[-1]).index_select(0, slots).reshape(x.shape))


class ImageKvGraph(nn.Module):
    """Image tokens -> keys and values of every CA layer. They depend on no text and no position in one."""

    def __init__(self, model: CasaForConditionalGeneration, spec: GraphSpec) -> None:
        super().__init__()
        self.language_model = model.model.language_model
        self.config = model.config

    def forward(self, image_embeds: Tensor, image_positions: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute the keys and values; see `graph_spec.image_kv_spec` for shapes."""
        images = image_embeds.to(self.language_model.embed_tokens.weight.dtype)
        rope = None
        if image_positions is not None:
            inv_freq = self.language_model.rotary_emb.inv_freq.float()
            tables = axes_rotary_tables(image_positions, inv_freq, self.config.mrope_section)
            rope = tuple(table[:, None] for table in tables)
        outputs: list[Tensor] = []
        for layer in self.config.cross_attention_layers:
            outputs += self.language_model.layers[layer].image_key_value(images, rope)
        return tuple(outputs)


class _GraphCache:
    """Stands where decoder layers expect a `CasaCache`: past keys are graph inputs, present ones become outputs."""

    def __init__(self, tensors: dict[str, Tensor], past: str, present: str) -> None:
        self.tensors, self.past, self.present = tensors, past, present

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        pair = []
        for part, new in (("key", key), ("value", value)):
            whole = torch.cat([self.tensors[f"{self.past}_{part}.{layer}"], new], dim=2)
            self.tensors[f"{self.present}_{part}.{layer}"] = whole
            pair.append(whole)
        return pair[0], pair[1]

    def with_window(self, layer: int, key: None, value: None) -> tuple[Tensor, Tensor]:
        return self.tensors[f"image_key.{layer}"], self.tensors[f"image_value.{layer}"]


class _LayerCache:
    """One layer's CA text cache, with the method of transformers' `DynamicLayer`."""

    def __init__(self, cache: _GraphCache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(key, value, self.layer)


class DecoderGraph(nn.Module):
    """Embeddings, decoder layers and output layer, for prefill and decode alike.

    Which keys a token sees follows from positions alone, planned outside with `casa_engine.windows`: an image token
    is seen by the tokens whose window starts at the image's own insertion point (`image_starts`), CA text keys by
    tokens from their window's start on. -1 marks padding; a padded token's `window_starts` is -2, so that it matches
    no padded image token.
    """

    def __init__(self, model: CasaForConditionalGeneration, spec: GraphSpec) -> None:
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self.config, self.spec = model.config, spec

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute logits and caches; see `graph_spec.decoder_spec` for names and shapes."""
        tensors = dict(zip((tensor.name for tensor in self.spec.inputs), inputs, strict=True))
        x = self.language_model.embed_tokens(tensors["input_ids"])
        layer_inputs = self._layer_inputs(tensors)
        for layer in self.language_model.layers:
            x = layer(x, layer_inputs)
        x = self.language_model.norm(x.index_select(1, tensors["logits_indices"]))
        tensors["logits"] = self.lm_head(x).float()
        return tuple(tensors[tensor.name] for tensor in self.spec.outputs)

    def _layer_inputs(self, tensors: dict[str, Tensor]) -> LayerInputs:
        positions, starts = tensors["positions"], tensors["window_starts"]
        inv_freq = self.language_model.rotary_emb.inv_freq.float()
        text_rope = tuple(table[:, None] for table in rotary_tables(positions.clamp(min=0), inv_freq))
        keys = torch.cat([tensors["past_positions"], positions], dim=1)[:, None]
        causal = (keys >= 0) & (keys <= positions[..., None])
        cache: Any = _GraphCache(tensors, "past", "present")
        window_rope = text_mask = relative = None
        if self.config.sees_window_text:
            relative = positions.clamp(min=0) - starts.clamp(min=0)
            window_rope = tuple(table[:, None] for table in rotary_tables(relative, inv_freq))
            keys = torch.cat([tensors["window_past_positions"], positions], dim=1)[:, None]
            text_mask = (keys >= starts.clamp(min=0)[..., None]) & (keys <= positions[..., None])
            text_cache = _GraphCache(tensors, "window_past", "window_present")
            cache.ca_text = {layer: _LayerCache(text_cache, layer) for layer in cache_layers(self.config, "image")}
        windows = WindowBatch(
            relative=relative,
            image_mask=tensors["image_starts"][:, None] == starts[..., None],
            text_mask=text_mask,
            gather=None,
            image_rope=None,
            kept=None,
            kept_images=None,
            kept_points=[],
        )
        return LayerInputs(text_rope, causal, windows, window_rope, None, cache, grouped_attention)


GRAPHS = {"vision": VisionGraph, "image_kv": ImageKvGraph, "decoder": DecoderGraph}
