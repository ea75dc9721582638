"""A decode step without vLLM: the eager model's weights, the plugin's kernels, a CUDA graph.

For machines where vLLM cannot be installed. It shows what the kernels and graphs reach, not what
an engine reaches: no scheduler, no sampling but argmax, sequences of one length.

Self-attention runs through the same kernel as CA: a window of text only that starts at 0.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import linear, silu

from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.rope import rotary_tables, rotate
from casa_vllm.ops import WindowAttentionMetadata, window_attention, write_pages

BLOCK_SIZE = 16


@dataclass
class Attention:
    """One attention's fused projections (self-attention's or CA's), and the norms of its heads where it has them."""

    qkv: torch.Tensor
    bias: torch.Tensor | None
    output: torch.Tensor
    query_norm: torch.nn.Module | None
    key_norm: torch.nn.Module | None

    @classmethod
    def of(cls, projections: torch.nn.Module, *, keys: bool) -> "Attention":
        """Fuse query, key and value, or take the query alone (`ca`: text has no CA keys)."""
        parts = [projections.q_proj]
        if keys:
            parts += [projections.k_proj, projections.v_proj]
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        weight = torch.cat([part.weight for part in parts])
        return cls(weight, bias, projections.o_proj.weight, projections.q_norm, projections.k_norm)


class PagedDecoder:
    """Decodes S sequences that have one image window each, open since their first token.

    Args:
        model: Eager model on the device; its weights are used, fused copies are made.
        num_seqs: S.
        image_tokens: Image tokens of every sequence.
        max_text: Longest text of a sequence.
        use_triton: Kernels in Triton (a GPU) or torch.
    """

    def __init__(
        self,
        model: CasaForConditionalGeneration,
        num_seqs: int,
        image_tokens: int,
        max_text: int,
        *,
        use_triton: bool,
    ) -> None:
        self.model, self.config, self.use_triton = model, model.config, use_triton
        text = self.config.text_config
        self.num_heads, self.num_kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.scale = self.config.head_dim**-0.5
        weight = model.lm_head.weight
        self.device, self.dtype = weight.device, weight.dtype
        rotary = model.model.language_model.rotary_emb
        steps = torch.arange(max_text, device=self.device)
        self.cos, self.sin = rotary_tables(steps, rotary.inv_freq.float())
        self._allocate(num_seqs, image_tokens, max_text)
        self._fuse()
        self.input_ids = torch.zeros(num_seqs, dtype=torch.long, device=self.device)
        self.positions = torch.zeros(num_seqs, dtype=torch.long, device=self.device)
        self.logits: torch.Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def _allocate(self, num_seqs: int, image_tokens: int, max_text: int) -> None:
        """Caches with each sequence's pages in a row, and metadata that steps only overwrite."""
        int32 = {"dtype": torch.int32, "device": self.device}
        num_layers = self.config.text_config.num_hidden_layers
        image_pages, text_pages = -(-image_tokens // BLOCK_SIZE), -(-max_text // BLOCK_SIZE)

        def caches(pages: int) -> list[torch.Tensor]:
            shape = (num_seqs * pages, self.num_kv_heads, BLOCK_SIZE, 2 * self.config.head_dim)
            return [torch.randn(shape, dtype=self.dtype, device=self.device) for _ in range(num_layers)]

        self.image_caches, self.text_caches = caches(image_pages), caches(text_pages)
        self.window_caches = caches(text_pages) if self.config.sees_window_text else None
        tables = torch.arange(num_seqs * image_pages, **int32).view(num_seqs, -1)
        self.text_table = torch.arange(num_seqs * text_pages, **int32).view(num_seqs, -1)
        lens = torch.full((num_seqs, image_pages), BLOCK_SIZE, **int32)
        lens[:, -1] = image_tokens - (image_pages - 1) * BLOCK_SIZE
        zeros = torch.zeros(num_seqs, **int32)
        self.text_positions = torch.zeros(num_seqs, **int32)
        self.slots = torch.zeros(num_seqs, dtype=torch.int64, device=self.device)
        shared = {
            "query_start_loc": torch.arange(num_seqs + 1, **int32),
            "first_positions": self.text_positions,
            "image_block_table": tables,
            "image_page_lens": lens,
            "text_starts": zeros,
            "text_rows": torch.arange(num_seqs, **int32),
            "max_query_len": 1,
            "num_tokens": num_seqs,
        }
        with_text = {
            "text_block_table": self.text_table,
            "text_slot_mapping": self.slots,
            "max_text_len": max_text,
        }
        no_text = {"text_block_table": None, "text_slot_mapping": None, "max_text_len": 0}
        pages = torch.full((num_seqs,), image_pages, **int32)
        self.self_windows = WindowAttentionMetadata(**shared, **with_text, num_image_pages=zeros, has_image=False)
        self.cross_windows = WindowAttentionMetadata(
            **shared,
            **(with_text if self.config.sees_window_text else no_text),
            num_image_pages=pages,
            has_image=True,
        )

    def _fuse(self) -> None:
        self.fused = []
        for layer in self.model.model.language_model.layers:
            own = None
            if layer.has_ca:
                source = layer.cross_attn or layer.self_attn
                own = Attention.of(source, keys=self.config.sees_window_text)
            stream = Attention.of(layer.self_attn, keys=True) if layer.has_sa else None
            gate_up = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
            self.fused.append((stream, own, gate_up))

    def write_image(self, embeds: torch.Tensor, rope: tuple | None) -> None:
        """Give every sequence the same image.

        Args:
            embeds: (N, C) output of the vision encoder.
            rope: cos, sin (N, D) of image keys for `ca_tv`, else None.

        Mutates:
            The image caches.
        """
        num_seqs, pages = self.cross_windows.image_block_table.shape
        first = torch.arange(num_seqs, device=self.device)[:, None] * pages * BLOCK_SIZE
        slots = (first + torch.arange(len(embeds), device=self.device)).flatten()
        for index, layer in enumerate(self.model.model.language_model.layers):
            if not layer.has_ca:
                continue
            normed = layer.input_layernorm(embeds) if layer.normalize_image_tokens else embeds
            key, value = (layer.cross_attn or layer.self_attn).key_value(normed[None])
            if rope is not None:
                key = rotate(key, *rope)
            key, value = (x[0].transpose(0, 1).repeat(num_seqs, 1, 1) for x in (key, value))
            write_pages(key, value, self.image_caches[index], slots, use_triton=self.use_triton)

    def step(self) -> None:
        """One token of every sequence: `input_ids` at `positions` -> `logits`, and on to the next.

        Mutates:
            Caches, metadata, `input_ids` (argmax), `positions`, `logits`.
        """
        self.text_positions.copy_(self.positions)
        block = self.text_table.gather(1, (self.positions // BLOCK_SIZE)[:, None])[:, 0].long()
        self.slots.copy_(block * BLOCK_SIZE + self.positions % BLOCK_SIZE)
        rope = self.cos[self.positions][:, None], self.sin[self.positions][:, None]
        if not self.use_triton:
            self.self_windows.torch_buckets = self.cross_windows.torch_buckets = None
        text_model = self.model.model.language_model
        x = text_model.embed_tokens(self.input_ids)
        for index, layer in enumerate(text_model.layers):
            stream, own, gate_up = self.fused[index]
            h = layer.input_layernorm(x)
            if stream is not None:
                x = x + self._attend(h, stream, rope, self.self_windows, self.text_caches, index)
            if own is not None:
                caches = self.window_caches
                cross_rope = rope if self.config.sees_window_text else None
                x = x + self._attend(h, own, cross_rope, self.cross_windows, caches, index)
            gate, up = linear(layer.post_attention_layernorm(x), gate_up).chunk(2, -1)
            x = x + layer.mlp.down_proj(silu(gate) * up)
        logits = self.model.lm_head(text_model.norm(x))
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        self.input_ids.copy_(logits.argmax(-1))
        self.positions.add_(1)

    def _attend(self, h, attention, rope, windows, text_caches, index) -> torch.Tensor:
        heads = linear(h, attention.qkv, attention.bias).unflatten(-1, (-1, self.config.head_dim))
        query = attention.query_norm(heads[:, : self.num_heads]).contiguous()
        if rope is not None:
            query = rotate(query, *rope)
            key, value = heads[:, self.num_heads :].chunk(2, 1)
            key, cache = rotate(attention.key_norm(key), *rope), text_caches[index]
            write_pages(key.contiguous(), value.contiguous(), cache, self.slots, use_triton=self.use_triton)
        output = torch.empty_like(query)
        window_attention(
            query,
            self.image_caches[index],
            None if windows.text_block_table is None else text_caches[index],
            windows,
            self.scale,
            output,
            use_triton=self.use_triton,
        )
        return linear(output.flatten(1), attention.output)

    def capture(self) -> None:
        """Record `step` as a CUDA graph, which `run` replays. Needs a GPU."""
        positions = self.positions.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()  # compiles the kernels
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()
        self.positions.copy_(positions)

    def run(self) -> None:
        """One step, as a graph where one was captured."""
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
