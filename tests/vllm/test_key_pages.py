"""Kernels that rotate queries and keys and write keys and values to pages, against the torch path written out.

They run under Triton's interpreter, in a process of their own (see test_window_attention.py).
"""

import os

import pytest
import torch

from casa_engine.rope import axes_rotary_tables, rotary_tables, rotate
from casa_vllm.ops import write_pages
from interpreter_process import check_under_interpreter

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
USE_TRITON = IS_INTERPRETED or torch.cuda.is_available()
DEVICE = "cuda" if USE_TRITON and not IS_INTERPRETED else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Absolute and relative. The interpreter cuts bfloat16 off instead of rounding it, up to three times a number (each side
# of the norm's weight, the result); float32 differs by the order of sums.
TOLERANCE = {torch.float32: (2e-6, 0), torch.bfloat16: (4e-2, 3 * 2**-7), torch.float16: (5e-3, 0)}
BLOCK, EPS = 16, 1e-6

with_triton = pytest.mark.skipif(not USE_TRITON, reason="runs in the process that the first test starts")
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.mark.skipif(USE_TRITON, reason="this session already runs the Triton kernels")
def test_under_the_interpreter():
    check_under_interpreter(__file__)


def random(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def normed(x, weight):
    """The norm of vLLM: rounded before and after the weight."""
    if weight is None:
        return x
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return scaled.to(x.dtype) * weight


def rotated(x, cos, sin):
    """(T, heads, D) with the first elements rotated, as many as the (T, R) tables have."""
    size = cos.shape[-1]
    return torch.cat((rotate(x[..., :size], cos[:, None], sin[:, None]), x[..., size:]), -1)


def empty_cache(num_blocks, kv_heads, head_dim, dtype):
    """A cache of NaN, tokens before heads in memory as an engine's may be."""
    cache = torch.full((num_blocks, BLOCK, kv_heads, 2 * head_dim), torch.nan, dtype=dtype, device=DEVICE)
    return cache.transpose(1, 2)


def assert_close(found, expected):
    atol, rtol = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol, equal_nan=True)


@with_triton
@dtypes
@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"),
    [(4, 2, 64, 64), (4, 1, 128, 128), (3, 3, 80, 80), (2, 1, 96, 48)],
    ids=["halves-of-64", "halves-of-128", "halves-of-80", "half-of-96-rotated"],
)
def test_text_heads(heads, kv_heads, head_dim, rotary_dim, has_norm, dtype):
    from casa_vllm.ops.triton_key_pages import prepare_text_heads

    num_tokens = 6
    # Views of one product, as self-attention's are: nothing of it may change.
    qkv = random(num_tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    before = qkv.clone()
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    query, key, value = (part.unflatten(-1, (-1, head_dim)) for part in qkv.split(sizes, -1))
    # A step's padding has no slots; a token without a slot of its own has -1.
    slots = torch.tensor([17, -1, 40, 0, 63], device=DEVICE)
    positions = torch.tensor([3, 0, 7, 200, 1, 0, 0], device=DEVICE)
    inv_freq = 1 / 100 ** (torch.arange(0, rotary_dim, 2, device=DEVICE) / rotary_dim)
    angles = torch.arange(256, device=DEVICE)[:, None] * inv_freq
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(dtype)
    norms = tuple(random(2, head_dim, dtype=dtype, seed=1)) if has_norm else None
    cache = empty_cache(5, kv_heads, head_dim, dtype)

    prepared = prepare_text_heads(query, key, value, cache, slots, positions, cos_sin, norms, EPS)

    assert torch.equal(qkv, before)
    half = rotary_dim // 2
    tables = cos_sin[positions[:num_tokens]].float()
    cos, sin = (torch.cat((part, part), -1) for part in tables.split(half, -1))
    query_norm, key_norm = norms or (None, None)
    assert prepared.is_contiguous()
    assert_close(prepared, rotated(normed(query, query_norm), cos, sin))
    expected = empty_cache(5, kv_heads, head_dim, dtype)
    write_pages(rotated(normed(key, key_norm), cos, sin), value, expected, slots, use_triton=False)
    assert_close(cache, expected)


@with_triton
@dtypes
def test_queries_normed_alone(dtype, heads=4, head_dim=64):
    from casa_vllm.ops.triton_key_pages import normalize_heads

    query = random(3, heads, head_dim, dtype=dtype)
    weight = random(head_dim, dtype=dtype, seed=1)
    assert_close(normalize_heads(query, weight, EPS), normed(query, weight))


ROPES = {
    "no-rotation": None,
    "one-axis": lambda positions, inv_freq: rotary_tables(positions[0], inv_freq),
    "three-axes": lambda positions, inv_freq: axes_rotary_tables(
        positions, inv_freq, [len(inv_freq) * eighths // 8 for eighths in (2, 3, 3)]
    ),
}


@with_triton
@dtypes
@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize("rope", ROPES)
def test_image_heads(rope, has_norm, dtype, kv_heads=2, head_dim=64):
    from casa_vllm.ops.triton_key_pages import write_image_heads

    num_layers, num_tokens = 3, 7
    projected = random(num_layers, num_tokens, 2 * kv_heads * head_dim, dtype=dtype)
    slots = torch.arange(num_layers * num_tokens, device=DEVICE).view(num_layers, num_tokens) + 20
    slots[1, 2] = -1
    positions = torch.arange(3 * num_tokens, device=DEVICE).view(3, num_tokens) % 5
    inv_freq = 1 / 100 ** (torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    tables = None if ROPES[rope] is None else ROPES[rope](positions, inv_freq)
    norms = random(num_layers, head_dim, dtype=dtype, seed=1) if has_norm else None
    caches = [empty_cache(5, kv_heads, head_dim, dtype) for _ in range(num_layers)]
    addresses = torch.tensor([cache.data_ptr() for cache in caches], device=DEVICE)

    write_image_heads(projected, caches, addresses, slots, tables, norms, EPS)

    for layer, cache in enumerate(caches):
        key, value = (part.unflatten(-1, (-1, head_dim)) for part in projected[layer].chunk(2, -1))
        key = normed(key, None if norms is None else norms[layer])
        if tables is not None:
            key = rotated(key, *tables)
        expected = empty_cache(5, kv_heads, head_dim, dtype)
        write_pages(key, value, expected, slots[layer], use_triton=False)
        assert_close(cache, expected)
