"""How many kernels CA adds on a GPU, and that none of them is compiled inside a request; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from casa_vllm.ops import WindowAttentionMetadata

ROOT = Path(__file__).parents[2]
# Beside the matrix products of both attentions and self-attention's own kernels.
KERNELS_OF_A_LAYER = {
    "2B-ca": 2,
    "2B-ca-shared": 3,  # the sum of both
    "3B-ca": 2,
    "2B-ca_tv": 3,
    "3B-ca_tv": 3,
    "3B-ca_tv-shared": 4,
    "qwen3-ca": 3,  # queries are normalised
    "qwen3-ca_tv": 3,
}


@pytest.fixture(scope="module")
def counts():
    """What benchmarks/kernel_counts.py counts, by model."""
    pytest.importorskip("triton", reason="Triton has no build for this machine")
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_counts.py"), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.vllm
@pytest.mark.parametrize("model", KERNELS_OF_A_LAYER)
def test_kernels_of_a_layer_in_decode(model, counts):
    decode = counts[model]["decode"]
    products = sum(decode.pop(name, 0) for name in ("mm", "addmm"))
    assert products == 2, "both attentions' projections, and their outputs"
    assert sum(decode.values()) <= KERNELS_OF_A_LAYER[model], decode


@pytest.mark.vllm
@pytest.mark.parametrize("model", KERNELS_OF_A_LAYER)
def test_launches_of_a_frame_do_not_grow_with_layers(model, counts):
    frame = counts[model]["frame"]
    assert frame["image_heads_kernel"] == 1
    assert sum(frame.get(name, 0) for name in ("bmm", "baddbmm")) == 1
    assert sum(frame.values()) <= 28, f"28 or 36 layers: {frame}"


def batch(num_sequences, num_pages, fields_offset):
    """A decode batch on the CPU; its fields begin at any multiple of 4 bytes."""

    def field(value):
        return torch.full((num_sequences + fields_offset,), value, dtype=torch.int32)[fields_offset:]

    return WindowAttentionMetadata(
        query_start_loc=torch.arange(num_sequences + 1, dtype=torch.int32),
        first_positions=field(5),
        image_block_table=torch.zeros(num_sequences, num_pages, dtype=torch.int32),
        image_page_lens=torch.ones(num_sequences, num_pages, dtype=torch.int32),
        num_image_pages=field(num_pages),
        text_starts=field(0),
        text_rows=field(0),
        text_block_table=torch.zeros(num_sequences, 2 + num_pages, dtype=torch.int32),
        text_slot_mapping=None,
        max_query_len=1,
        max_text_len=6,
        has_image=True,
        num_tokens=num_sequences,
    )


def test_no_batch_compiles_a_kernel_anew(monkeypatch):
    """Triton compiles once for each way in which arguments are specialised; asked of Triton itself."""
    pytest.importorskip("triton", reason="Triton has no build for this machine")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from casa_vllm.ops import triton_window_attention as attention
    from casa_vllm.ops.segments import SegmentTensors
    from casa_vllm.ops.triton_build_segments import triton_build_segments

    backend = make_backend(GPUTarget("cuda", 90, 32))
    seen: dict[str, set[str]] = {}

    def specialise(kernel, *args, grid, warmup, **kwargs):
        kwargs.pop("num_warps", None)
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        seen.setdefault(kernel.__name__, set()).add(str(binder(*args, **kwargs)[1]))

    monkeypatch.setattr(JITFunction, "run", specialise)
    monkeypatch.setattr(attention, "TARGET_PROGRAMS", 1)  # one way to split keys, whatever the batch
    cache = torch.zeros(2, 2, 16, 128)
    for num_sequences, num_pages, offset in [(1, 1, 0), (2, 16, 1), (3, 5, 2), (16, 1, 3), (17, 32, 4)]:
        query = torch.zeros(num_sequences, 4, 64)
        metadata = batch(num_sequences, num_pages, offset)
        attention.triton_window_attention(query, cache, cache, metadata, 1.0, torch.empty_like(query))
        tensors = SegmentTensors.empty(metadata.query_start_loc, num_pages, num_sequences + offset)
        rows, positions = torch.zeros(num_sequences, dtype=torch.int64), torch.zeros(num_sequences, dtype=torch.int64)
        # Decode graphs read the first rows of one buffer; a step of text alone has no splits.
        splits = torch.zeros(4 * num_sequences + offset, dtype=torch.int32)[offset:].view(-1, 4)
        # The warm-up has one row of four columns.
        state = torch.zeros(17, 3 + num_pages + 13 * offset, dtype=torch.int32)
        for parts in (None, splits):
            triton_build_segments(
                tensors, state, rows, num_sequences, metadata.text_block_table, positions, parts
            )  # fmt: skip
    expected = {"_window_attention_kernel": 1, "_build_segments_kernel": 2}  # with splits and without
    assert {name: len(ways) for name, ways in seen.items()} == expected
