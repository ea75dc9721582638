"""Window attention over paged caches against the equation written out in float64.

The Triton kernels run here too, under Triton's interpreter, in a process of their own: the
interpreter has to be switched on before triton is imported and must not reach other tests.
"""

import importlib.util
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from casa_vllm.ops import WindowAttentionMetadata, window_attention, write_pages
from interpreter_process import check_under_interpreter

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
USE_TRITON = IS_INTERPRETED or torch.cuda.is_available()
DEVICE = "cuda" if USE_TRITON and not IS_INTERPRETED else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@dataclass
class Segment:
    """One (request, window): image sizes in tokens, queries, and the window's text so far."""

    images: tuple[int, ...] = ()
    num_queries: int = 1
    start: int = 0
    first: int = 0


CASES = {
    "text-before-the-first-image": [Segment(num_queries=5)],
    "one-image": [Segment((7,), 3, start=4, first=4)],
    "adjacent-images-with-partial-pages": [Segment((5, 16, 3), 6, start=2, first=5)],
    "unequal-windows": [
        Segment((40,), 1, start=30, first=77),
        Segment((), 9, start=0, first=0),
        Segment((1,), 1, start=3, first=3),
        Segment((16, 16), 17, start=9, first=20),
    ],
    "empty-segments": [
        Segment((9,), 2, start=1, first=1),
        Segment((4,), 0, start=1, first=1),
        Segment((), 0),
    ],
    "decode-batch": [
        Segment((33,), 1, start=2, first=60),
        Segment((), 1, start=0, first=18),
        Segment((8, 8), 1, start=70, first=70),
        Segment((), 0),
    ],
}


class Paged:
    """The caches, metadata and queries of a list of segments, and the float64 answer."""

    def __init__(
        self, segments, *, heads=4, kv_heads=2, head_dim=32, dtype=torch.float32,
        with_text=True, image_block=16, text_block=16, seed=0,
    ):  # fmt: skip
        self.rng = np.random.default_rng(seed)
        self.segments, self.dtype, self.scale = segments, dtype, head_dim**-0.5
        # Slots that hold nothing are NaN, the null block 0 included: a leak poisons the output.
        blocks = 2 + sum(-(-size // image_block) for s in segments for size in s.images)
        shape = (blocks, kv_heads, image_block, 2 * head_dim)
        self.image_cache = torch.full(shape, torch.nan, dtype=dtype)
        text_blocks = 2 + sum((s.first + s.num_queries) // text_block + 1 for s in segments)
        # Strides of an engine's own: tokens before heads.
        shape = (text_blocks, text_block, kv_heads, 2 * head_dim)
        self.text_cache = torch.full(shape, torch.nan, dtype=dtype).transpose(1, 2)
        self.num_tokens = sum(s.num_queries for s in segments)
        self.query = self._random(self.num_tokens, heads, head_dim)
        self.expected = np.zeros(self.query.shape)
        self._fill(heads // kv_heads, with_text)

    def _random(self, *shape):
        return torch.from_numpy(self.rng.standard_normal(shape)).to(self.dtype)

    def _write(self, cache, free_blocks, count):
        """Random keys and values for `count` slots of fresh blocks, in a random block order."""
        kv_heads, block_size, head_dim = cache.shape[1], cache.shape[2], cache.shape[3] // 2
        blocks = [free_blocks.pop() for _ in range(-(-count // block_size))]
        slots = [blocks[i // block_size] * block_size + i % block_size for i in range(count)]
        keys, values = self._random(2, count, kv_heads, head_dim)
        slots = torch.tensor(slots, dtype=torch.int64)
        write_pages(keys, values, cache, slots, use_triton=False)
        return blocks, keys.double().numpy(), values.double().numpy()

    def _fill(self, group, with_text):
        image_blocks = list(self.rng.permutation(np.arange(1, len(self.image_cache))))
        text_blocks = list(self.rng.permutation(np.arange(1, len(self.text_cache))))
        table, lens, text_table, token = [], [], [], 0
        for segment in self.segments:
            keys, values, pages, page_lens = [], [], [], []
            for size in segment.images:
                blocks, k, v = self._write(self.image_cache, image_blocks, size)
                block_size = self.image_cache.shape[2]
                pages += blocks
                page_lens += [min(block_size, size - i) for i in range(0, size, block_size)]
                keys, values = [*keys, *k], [*values, *v]
            table, lens = [*table, pages], [*lens, page_lens]
            num_text = segment.first + segment.num_queries
            blocks, text_k, text_v = self._write(self.text_cache, text_blocks, num_text)
            text_table.append(blocks)
            for i in range(segment.num_queries):
                seen = range(segment.start, segment.first + i + 1) if with_text else ()
                self._expect(token, [*keys, *text_k[list(seen)]], [*values, *text_v[list(seen)]], group)
                token += 1
        lengths = [s.num_queries for s in self.segments]
        int32 = {"dtype": torch.int32}
        self.metadata = WindowAttentionMetadata(
            query_start_loc=torch.tensor(np.cumsum([0, *lengths]), **int32),
            first_positions=torch.tensor([s.first for s in self.segments], **int32),
            image_block_table=torch.tensor(_padded(table), **int32),
            image_page_lens=torch.tensor(_padded(lens), **int32),
            num_image_pages=torch.tensor([len(pages) for pages in table], **int32),
            text_starts=torch.tensor([s.start for s in self.segments], **int32),
            text_rows=torch.arange(len(self.segments), **int32),
            text_block_table=torch.tensor(_padded(text_table), **int32) if with_text else None,
            text_slot_mapping=None,
            max_query_len=max(lengths),
            max_text_len=max(s.first + s.num_queries - s.start for s in self.segments),
            has_image=True,
            num_tokens=self.num_tokens,
        )

    def _expect(self, token, keys, values, group):
        if not keys:
            return
        keys, values = np.array(keys), np.array(values)
        for head, query in enumerate(self.query[token].double().numpy()):
            scores = keys[:, head // group] @ query * self.scale
            weights = np.exp(scores - scores.max())
            self.expected[token, head] = weights @ values[:, head // group] / weights.sum()

    def run(self, use_triton=USE_TRITON, num_padding=2, beside=None):
        """The results; `beside` (T + padding, H, D), which must stand before them, is checked here."""
        num_heads = self.query.shape[1]
        width = num_heads if beside is None else 2 * num_heads
        output = torch.full((self.num_tokens + num_padding, width, self.query.shape[2]), 7.0)
        output = output.to(DEVICE, self.dtype)
        padding = torch.full((num_padding, *self.query.shape[1:]), torch.nan, dtype=self.dtype)
        window_attention(
            torch.cat((self.query, padding)).to(DEVICE),
            self.image_cache.to(DEVICE),
            self.text_cache.to(DEVICE) if self.metadata.text_block_table is not None else None,
            _to_device(self.metadata),
            self.scale,
            output,
            None if beside is None else beside.to(DEVICE),
            use_triton=use_triton,
        )
        assert (output[self.num_tokens :] == 0).all(), "padding rows must become 0"
        if beside is not None:
            assert torch.equal(output[: self.num_tokens, :num_heads].cpu(), beside[: self.num_tokens])
        return output[: self.num_tokens, -num_heads:].double().cpu().numpy()

    def check(self, **kwargs):
        output = self.run(**kwargs)
        np.testing.assert_allclose(output, self.expected, atol=TOLERANCE[self.dtype], rtol=0)
        no_key = ~self.expected.any((1, 2))
        assert (output[no_key] == 0).all(), "a query without any key must get exactly 0"


def _padded(rows):
    width = max([len(row) for row in rows] + [1])
    return [[*row, *[0] * (width - len(row))] for row in rows]


def _to_device(metadata):
    moved = {k: v.to(DEVICE) for k, v in vars(metadata).items() if isinstance(v, torch.Tensor)}
    return replace(metadata, **moved)


@pytest.fixture(autouse=True)
def few_splits(monkeypatch):
    """The interpreter runs a GPU's programs one by one: 4 splits of the keys show what 32 do."""
    if IS_INTERPRETED:
        from casa_vllm.ops import triton_window_attention

        monkeypatch.setattr(triton_window_attention, "MAX_SPLITS", 4)


@pytest.mark.parametrize("with_text", [False, True], ids=["ca", "ca_tv"])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case, with_text):
    Paged(CASES[case], with_text=with_text).check()


@pytest.mark.parametrize(
    ("case", "with_text", "max_splits"),
    [("decode-batch", False, 1), ("decode-batch", True, 4), ("unequal-windows", True, 1)],
)
def test_results_stand_beside_other_heads(case, with_text, max_splits, monkeypatch):
    """What self-attention attended and the result are one tensor, without a kernel for it."""
    if IS_INTERPRETED:
        from casa_vllm.ops import triton_window_attention

        monkeypatch.setattr(triton_window_attention, "MAX_SPLITS", max_splits)
    paged = Paged(CASES[case], head_dim=80, with_text=with_text)
    rows = torch.randn(paged.num_tokens + 2, 2 * paged.query[0].numel())
    beside = rows[:, : rows.shape[1] // 2].unflatten(1, paged.query.shape[1:])  # rows apart, as of a wider tensor
    paged.check(beside=beside)
    paged.metadata.has_image = False
    paged.metadata.torch_buckets = None
    assert with_text or (paged.run(beside=beside) == 0).all()


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_head_sizes(head_dim):
    segments = CASES["unequal-windows"]
    Paged(segments, heads=6, kv_heads=2, head_dim=head_dim).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision(dtype):
    if IS_INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the raw bits of bfloat16 in tl.dot")
    Paged(CASES["unequal-windows"], dtype=dtype).check()


def test_block_sizes_of_image_and_text_may_differ():
    Paged(CASES["unequal-windows"], image_block=32, text_block=16).check()


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 1), (14, 2)])
def test_grouped_heads(heads, kv_heads):
    Paged(CASES["decode-batch"], heads=heads, kv_heads=kv_heads).check()


def test_random_batches():
    rng = np.random.default_rng(1)
    for seed in range(3 if IS_INTERPRETED else 30):
        segments = []
        for _ in range(rng.integers(1, 6)):
            start = int(rng.integers(0, 40))
            sizes = tuple(int(n) for n in rng.integers(1, 50, rng.integers(0, 4)))
            first = start + int(rng.integers(0, 40))
            segments.append(Segment(sizes, int(rng.integers(0, 20)), start, first))
        segments.append(Segment((), 1))
        Paged(segments, with_text=bool(seed % 2), seed=seed).check()


def test_no_images_skips_the_work_of_ca():
    """Told that there is none, nothing looks: an image that is there all the same does not show."""
    paged = Paged([Segment((7,), num_queries=4)], with_text=False)
    assert paged.expected.all()
    paged.metadata.has_image = False
    assert (paged.run() == 0).all()


@pytest.mark.parametrize("short", ["query", "output", "beside"])
def test_fewer_rows_than_tokens_are_refused(short):
    """A step in a graph that was captured for fewer tokens: kernels would write beyond its buffers."""
    paged = Paged(CASES["decode-batch"])
    rows = {name: torch.zeros_like(paged.query) for name in ("query", "beside")}
    rows["output"] = torch.cat([paged.query, paged.query], dim=1)
    rows[short] = rows[short][:-1]
    with pytest.raises(ValueError, match=f"{paged.num_tokens - 1} rows for a step of {paged.num_tokens} tokens"):
        window_attention(
            rows["query"],
            paged.image_cache,
            paged.text_cache,
            paged.metadata,
            1.0,
            rows["output"],
            rows["beside"],
            use_triton=USE_TRITON,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_write_pages(dtype):
    torch.manual_seed(0)
    cache = torch.zeros(6, 16, 2, 160, dtype=dtype, device=DEVICE).transpose(1, 2)
    key, value = torch.randn(2, 5, 2, 80, dtype=dtype, device=DEVICE)
    slots = torch.tensor([17, -1, 95, 0], device=DEVICE)
    write_pages(key, value, cache, slots, use_triton=USE_TRITON)
    for token, slot in [(0, 17), (2, 95), (3, 0)]:
        assert torch.equal(cache[slot // 16, :, slot % 16, :80], key[token])
        assert torch.equal(cache[slot // 16, :, slot % 16, 80:], value[token])
    assert int((cache != 0).any(-1).any(1).sum()) == 3, "only the three slots are written"


@pytest.mark.skipif(USE_TRITON, reason="this session already runs the Triton kernels")
def test_triton_kernels_under_the_interpreter():
    check_under_interpreter(__file__)


@pytest.mark.skipif(USE_TRITON, reason="compiled by being run, or interpreted")
@pytest.mark.parametrize("is_decode", [True, False], ids=["decode", "prefill"])
def test_kernel_compiles_for_an_h200(is_decode):
    """Down to machine code, bf16 at the 3B preset's sizes: needs no GPU."""
    pytest.importorskip("triton", reason="Triton has no build for this machine")
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from casa_vllm.ops.triton_window_attention import _window_attention_kernel as kernel

    constants = {
        "IMAGE_BLOCK": 16, "TEXT_BLOCK": 16, "HAS_TEXT": True, "HEAD_DIM": 128, "DIMS": 128, "GROUP": 8,
        "TILE_QUERIES": 1 if is_decode else 8, "ROWS": 16 if is_decode else 64, "TILE_KEYS": 32,
        "SPLITS": 16 if is_decode else 1, "IS_DECODE": is_decode, "PRECISION": "tf32", "BESIDE": 2048,
    }  # fmt: skip
    pointers = dict.fromkeys(("query_ptr", "image_ptr", "text_ptr", "output_ptr", "beside_ptr"), "*bf16")
    pointers |= dict.fromkeys(("partial_ptr", "max_ptr", "sum_ptr"), "*fp32")
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "*i32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    } | {"scale": "fp32"}
    indexes = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = compile_kernel(
        ASTSource(kernel, signature, constexprs=indexes), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}
    )
    assert compiled.asm["cubin"]
    # An H200's multiprocessor has 228 KiB; well below, so that several programs share one.
    assert compiled.metadata.shared <= 48 * 1024


def load_resources():
    """benchmarks/kernel_resources.py, which knows every kernel and its constants."""
    path = Path(__file__).parents[2] / "benchmarks" / "kernel_resources.py"
    spec = importlib.util.spec_from_file_location("kernel_resources", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(USE_TRITON, reason="an interpreted kernel is no compiled one")
def test_every_kernel_of_the_plugin_is_compiled_and_listed():
    pytest.importorskip("triton", reason="Triton has no build for this machine")
    folder = Path(__file__).parents[2] / "plugins" / "casa_vllm"
    sources = [path.read_text() for path in folder.rglob("triton_*.py")]
    kernels = {name for source in sources for name in re.findall(r"^def (_\w+_kernel)\(", source, re.MULTILINE)}
    resources = load_resources()
    assert {case.kernel.__name__ for case in resources.cases(128, torch.bfloat16)} == kernels


SOME = [(90, "bf16", 128)]
ALL = [(gpu, dtype, size) for gpu in (80, 90, 100) for dtype in ("bf16", "fp16", "fp32") for size in (64, 128)]
TARGETS = [pytest.param(*target, marks=() if target in SOME else pytest.mark.slow) for target in ALL]


@pytest.mark.skipif(USE_TRITON, reason="compiled by being run, or interpreted")
@pytest.mark.parametrize(("architecture", "dtype", "head_dim"), TARGETS)
def test_kernels_compile_ahead_of_time(architecture, dtype, head_dim):
    """Every kernel, specialised as in a launch, at the 3B preset's heads: needs no GPU."""
    pytest.importorskip("triton", reason="Triton has no build for this machine")
    resources = load_resources()
    for case in resources.cases(head_dim, resources.DTYPES[dtype]):
        used = resources.resources_of(resources.compile_case(case, architecture, dtype))
        # A multiprocessor has 164 KiB or more, so that three programs share one; float32 is for parity runs.
        assert used.shared_bytes <= (54 if dtype != "fp32" else 160) * 1024, case
