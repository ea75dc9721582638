"""Kernels, decode graphs and first tokens without vLLM, at the presets' sizes, random weights.

`python alone.py RESULTS [--tiny]`: the fall-back for a machine that vLLM does not run on. `--tiny` runs the same code
on a CPU with tiny models, to see that it works: its times mean nothing.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from floors import BYTES_PER_VALUE, decode_work, first_token_floor_ms, hardware
from paged_decoder import BLOCK_SIZE, PagedDecoder
from rows import Rows, median_ms
from sizes import PREFILL_TOKENS, Sizes, num_image_tokens, sizes

from casa_engine.configuration import CasaConfig
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.presets import preset_config
from casa_engine.rope import axes_rotary_tables, image_positions
from casa_vllm.ops import WindowAttentionMetadata, window_attention

PRESETS = ("CASA-Helium1-VL-2B", "CASA-Qwen2_5-VL-3B", "CASA-Qwen2_5-VL-3B-LiveCC")
TINY_PRESETS = ("tiny-llama", "tiny-qwen", "tiny-qwen3")
# Of the kernel in one graph: one alone is shorter than its launch.
GRAPH_CALLS = 20
# Of keys and values: five times the 50 MB that the second-level cache of an H100 or H200 holds, twice that of a B200.
COLD_BYTES = 256 << 20


def image_grid(config: CasaConfig, side: int) -> torch.Tensor:
    """int64 (1, 3): grid of a square image in patches."""
    patches = side // config.vision_config.patch_size
    return torch.tensor([[1, patches, patches]])


def random_model(name: str, sizes: Sizes) -> CasaForConditionalGeneration:
    """The preset with random weights, made on the device."""
    torch.manual_seed(0)
    torch.set_default_dtype(sizes.dtype)
    try:
        with torch.device(sizes.device):
            return CasaForConditionalGeneration(preset_config(name)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def bench_kernel(name: str, sizes: Sizes, rows: Rows) -> None:
    """Window attention of one layer's decode alone, beside reading its keys and values.

    Calls take turns on copies of these, so that none finds in the cache of the GPU what another has read.
    """
    config = preset_config(name)
    text = config.text_config
    heads, kv_heads, dim = text.num_attention_heads, text.num_key_value_heads, config.head_dim
    side = sizes.sides[-1]
    tokens = num_image_tokens(config, side)
    pages = -(-tokens // BLOCK_SIZE)
    int32 = {"dtype": torch.int32, "device": sizes.device}
    for num_seqs in sizes.num_seqs:
        query = torch.randn(num_seqs, heads, dim, dtype=sizes.dtype, device=sizes.device)
        kv_bytes = num_seqs * tokens * 2 * kv_heads * dim * BYTES_PER_VALUE
        on_gpu = sizes.device.type == "cuda"
        copies = -(-COLD_BYTES // kv_bytes) if on_gpu else 1
        shape = (copies * num_seqs * pages, kv_heads, BLOCK_SIZE, 2 * dim)
        cache = torch.randn(shape, dtype=sizes.dtype, device=sizes.device)
        lens = torch.full((num_seqs, pages), BLOCK_SIZE, **int32)
        lens[:, -1] = tokens - (pages - 1) * BLOCK_SIZE
        zeros = torch.zeros(num_seqs, **int32)
        blocks = torch.arange(copies * num_seqs * pages, **int32).view(copies, num_seqs, pages)
        metadata = WindowAttentionMetadata(
            query_start_loc=torch.arange(num_seqs + 1, **int32),
            first_positions=zeros,
            image_block_table=blocks[0],
            image_page_lens=lens,
            num_image_pages=torch.full((num_seqs,), pages, **int32),
            text_starts=zeros,
            text_rows=zeros,
            text_block_table=None,
            text_slot_mapping=None,
            max_query_len=1,
            max_text_len=0,
            has_image=True,
            num_tokens=num_seqs,
        )
        output = torch.empty_like(query)
        turns = [replace(metadata, image_block_table=table) for table in blocks]

        def attend(query=query, cache=cache, turns=turns, output=output, on_gpu=on_gpu):
            for metadata in turns:
                window_attention(query, cache, None, metadata, dim**-0.5, output, use_triton=on_gpu)

        rounds = -(-GRAPH_CALLS // copies) if on_gpu else 1
        milliseconds = median_ms(repeated(attend, rounds if on_gpu else None), sizes.device) / (rounds * copies)
        case = f"{name}, {num_seqs} x {tokens} image tokens"
        rows.add("kernel, one layer", case, milliseconds, floor=kv_bytes / hardware().bytes_per_s * 1e3)


def repeated(function, rounds: int | None):
    """A graph of so many calls; None: no graph."""
    if rounds is None:
        return function
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            function()
    return graph.replay


def bench_decode(name: str, model: CasaForConditionalGeneration, sizes: Sizes, rows: Rows) -> None:
    """Whole decode steps, as a CUDA graph on a GPU."""
    on_gpu, side = sizes.device.type == "cuda", sizes.sides[-1]
    tokens = num_image_tokens(model.config, side)
    for num_seqs in sizes.num_seqs:
        decoder = PagedDecoder(model, num_seqs, tokens, sizes.max_text, use_triton=on_gpu)
        if on_gpu:
            decoder.capture()
        decoder.positions.fill_(sizes.max_text // 2)
        work = decode_work(model.config, num_seqs, tokens, sizes.max_text // 2)
        milliseconds = median_ms(decoder.run, sizes.device, repeats=10)
        case = f"{name}, {num_seqs} sequences, {side} px image each"
        rows.add("decode step (no engine)", case, milliseconds, floor=work.floor_ms(hardware()))


def bench_first_token(name: str, model: CasaForConditionalGeneration, sizes: Sizes, rows: Rows) -> None:
    """Patches to logits of the first token, eagerly: vision encoder, image K/V, short prefill."""
    config = model.config
    vision = config.vision_config
    ids = torch.ones(1, PREFILL_TOKENS, dtype=torch.long, device=sizes.device)
    for side in sizes.sides:
        grid = image_grid(config, side).to(sizes.device)
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = torch.randn(int(grid.prod()), size, dtype=sizes.dtype, device=sizes.device)
        points = torch.zeros(1, 1, dtype=torch.long, device=sizes.device)

        def first_token(patches=patches, grid=grid, points=points):
            model(
                input_ids=ids,
                pixel_values=patches,
                image_grid_thw=grid,
                insertion_points=points,
                use_cache=True,
                logits_to_keep=1,
            )

        floor = first_token_floor_ms(config, side, PREFILL_TOKENS, hardware())
        milliseconds = median_ms(first_token, sizes.device, repeats=5)
        rows.add("first token (eager, no engine)", f"{name}, {side} px", milliseconds, floor=floor)


def check_decoder(sizes: Sizes) -> None:
    """Decoding step by step (with graphs on a GPU) must equal the eager model's one pass."""
    tiny = replace(sizes, dtype=torch.float32)
    on_gpu = sizes.device.type == "cuda"
    for name in TINY_PRESETS:
        model = random_model(name, tiny)
        config, grid = model.config, image_grid(model.config, 84).to(sizes.device)
        patches = torch.randn(int(grid.prod()), 1176, device=sizes.device)
        embeds = model.model.encode_images(patches, grid)
        decoder = PagedDecoder(model, 2, len(embeds), 48, use_triton=on_gpu)
        rope = None
        if config.sees_window_text:
            inv_freq = model.model.language_model.rotary_emb.inv_freq.float()
            positions = image_positions(grid[0].cpu(), config).to(sizes.device)
            rope = axes_rotary_tables(positions, inv_freq, config.mrope_section)
        decoder.write_image(embeds, rope)
        if on_gpu:
            decoder.capture()
        decoder.input_ids.fill_(5)
        decoder.positions.zero_()
        tokens, logits = [], []
        for _ in range(40):
            tokens.append(decoder.input_ids[:1].clone())
            decoder.run()
            logits.append(decoder.logits[0].clone())
        expected = model(
            input_ids=torch.cat(tokens)[None],
            image_embeds=embeds,
            image_grid_thw=grid,
            insertion_points=torch.zeros(1, 1, dtype=torch.long, device=sizes.device),
        ).logits[0]
        error = float((torch.stack(logits) - expected).abs().max())
        print(f"{name}: decode steps against one eager pass, greatest difference {error:.1e}")
        if not error < 1e-3:
            raise SystemExit(f"{name}: paged decoding differs from the eager model by {error}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    options = parser.parse_args()
    of, rows = sizes(is_tiny=options.tiny), Rows(options.results)
    check_decoder(of)
    for name in TINY_PRESETS if options.tiny else PRESETS:
        bench_kernel(name, of, rows)
        model = random_model(name, of)
        bench_decode(name, model, of, rows)
        bench_first_token(name, model, of, rows)
        del model
        if of.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
