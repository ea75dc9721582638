"""Segments of random steps against the window rule, token by token: planned on the host, built by torch and by Triton.

Triton's kernel runs under its interpreter, in a process of its own (see test_window_attention.py).
"""

import os
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from casa_engine.windows import last_window
from casa_vllm import attention_metadata
from casa_vllm.ops.build_segments import build_segments
from casa_vllm.ops.segments import SegmentTensors
from casa_vllm.window_states import SegmentPlan, WindowStates
from interpreter_process import check_under_interpreter

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
USE_TRITON = IS_INTERPRETED or torch.cuda.is_available()
DEVICE = "cuda" if USE_TRITON and not IS_INTERPRETED else "cpu"
BLOCK_SIZE, ROW_PAGES = 4, 40


@pytest.mark.skipif(USE_TRITON, reason="this session already runs the Triton kernels")
def test_under_the_interpreter():
    check_under_interpreter(__file__)


@pytest.fixture(autouse=True)
def several_rounds(monkeypatch):
    """The kernel's loops over pages and tokens go round more than once."""
    if USE_TRITON:
        from casa_vllm.ops import triton_build_segments

        monkeypatch.setattr(triton_build_segments, "BLOCK", 4)


class Request:
    """A prompt with images, read in steps of any size, and the row of pages that was sent for it."""

    def __init__(self, rng, row):
        self.row, self.num_tokens = row, rng.randrange(1, 60)
        self.points = sorted(rng.choices(range(self.num_tokens + 1), k=rng.randrange(5)))
        self.sizes = [rng.randrange(1, 7 * BLOCK_SIZE) for _ in self.points]
        self.computed = rng.choice([0, 0, rng.randrange(self.num_tokens)])
        # Images that no token can see any more have no pages in the row.
        live = last_window(self.computed, np.array(self.points))[1]
        counts = [0 if image < live else -(-size // BLOCK_SIZE) for image, size in enumerate(self.sizes)]
        pages = iter(rng.sample(range(1, 1000), sum(counts)))
        self.pages = [[next(pages) for _ in range(count)] for count in counts]

    def features(self):
        positions = zip(self.points, self.sizes, strict=True)
        return [
            SimpleNamespace(mm_position=SimpleNamespace(offset=point, get_num_embeds=lambda size=size: size))
            for point, size in positions
        ]

    def window(self, position):
        """(text start, [(page, valid tokens)]) of the token at a position."""
        start, first, end = last_window(position, np.array(self.points))
        seen = []
        for image in range(first, end):
            for index, page in enumerate(self.pages[image]):
                seen.append((page, min(self.sizes[image] - index * BLOCK_SIZE, BLOCK_SIZE)))
        return start, seen


class Worker:
    """Rows of requests that come and go, and the device's copy of their windows."""

    def __init__(self, rng, num_rows):
        self.rng, self.requests = rng, {}
        self.windows = WindowStates(num_rows, ROW_PAGES, ROW_PAGES, BLOCK_SIZE)
        self.state = torch.zeros(self.windows.table.shape, dtype=torch.int32, device=DEVICE)

    def step(self, num_padding=0, num_graph_padding=0):
        """Plan and build a step of some of the requests; yield what it was built of."""
        for row in range(len(self.windows.table)):
            if row not in self.requests or self.rng.random() < 0.1:
                request = self.requests[row] = Request(self.rng, row)
                self.windows.add_row(row, request.features(), request.computed)
        batch = self.rng.sample(list(self.requests.values()), self.rng.randrange(1, len(self.requests) + 1))
        most = 1 if num_padding else self.rng.choice([1, 7, 60])
        counts = [self.rng.randrange(1, most + 1) for _ in batch]
        rows = np.array([request.row for request in batch])
        computed = np.array([request.computed for request in batch], dtype=np.int32)
        plan = self.windows.plan(rows, computed, np.array(counts, dtype=np.int32))
        for row, num_values in self.windows.changed.items():
            self.state[row, :num_values] = torch.from_numpy(self.windows.table[row, :num_values])
        self.windows.changed.clear()
        tensors = self.build(plan, batch, rows, counts, num_padding, num_graph_padding)
        return plan, tensors, batch, counts

    def build(self, plan, batch, rows, counts, num_padding, num_graph_padding):
        positions = [
            p for request, n in zip(batch, counts, strict=True) for p in range(request.computed, request.computed + n)
        ]
        table = np.zeros((len(batch) + num_padding, ROW_PAGES), dtype=np.int32)
        for index, request in enumerate(batch):
            pages = [page for of_image in request.pages for page in of_image]
            table[index, : len(pages)] = pages
        starts = plan.query_start_loc if plan.splits is not None else np.cumsum([0, *counts])
        starts = np.append(starts, np.full(num_padding, starts[-1]))
        starts = given = torch.from_numpy(starts).to(DEVICE, torch.int32)
        num_positions = len(positions) + (num_graph_padding or 3)
        if num_graph_padding:
            starts = torch.full((num_positions + 1,), -77, dtype=torch.int32, device=DEVICE)
        tensors = SegmentTensors.empty(starts, max(plan.max_pages, 1), num_positions)
        for tensor in (tensors.fields, tensors.page_lens, tensors.pages, tensors.relative_positions):
            tensor.fill_(-77)  # what is not written shows
        build_segments(
            tensors,
            self.state,
            torch.from_numpy(rows).to(DEVICE),
            len(batch),
            torch.from_numpy(table).to(DEVICE),
            # Behind a step's tokens stand those of an earlier one.
            torch.tensor(positions + [77] * (num_positions - len(positions)), device=DEVICE),
            None if plan.splits is None else torch.from_numpy(plan.splits).to(DEVICE),
            padded=(given, plan.num_segments) if num_graph_padding else None,
            use_triton=USE_TRITON,
        )
        return tensors

    def advance(self, batch, counts):
        for request, count in zip(batch, counts, strict=True):
            request.computed += count


def check_step(plan, tensors, batch, counts):
    """Each token has the window that the rule gives it, and the plan's bounds are its segments'."""
    starts = tensors.query_start_loc.tolist()
    first_positions, text_starts, num_pages, requests = tensors.fields.tolist()
    tokens = [(index, request.computed + n) for index, request in enumerate(batch) for n in range(counts[index])]
    assert plan.num_tokens == len(tokens) == starts[plan.num_segments]
    text_lens = []
    for segment in range(plan.num_segments):
        part = tokens[starts[segment] : starts[segment + 1]]
        assert part, "a segment without a token"
        for offset, (index, position) in enumerate(part):
            start, seen = batch[index].window(position)
            assert (requests[segment], text_starts[segment], num_pages[segment]) == (index, start, len(seen))
            assert first_positions[segment] + offset == position
            assert tensors.relative_positions[starts[segment] + offset] == position - start
            pages = zip(tensors.pages[segment].tolist(), tensors.page_lens[segment].tolist(), strict=True)
            assert list(pages)[: len(seen)] == seen
        text_lens.append(part[-1][1] - text_starts[segment] + 1)
    assert set(tensors.relative_positions[len(tokens) :].tolist()) == {0}
    assert plan.max_query_len == np.diff(starts[: plan.num_segments + 1]).max()
    assert plan.max_text_len == max(text_lens)
    assert plan.max_pages == max(num_pages[: plan.num_segments])


@pytest.mark.parametrize("seed", range(6))
def test_random_steps(seed):
    rng = random.Random(seed)
    worker, num_split = Worker(rng, num_rows=5), 0
    for _ in range(12 if IS_INTERPRETED else 60):
        plan, *step = worker.step()
        check_step(plan, *step)
        worker.advance(*step[1:])
        num_split += plan.splits is not None
    assert num_split, "no step had tokens of several windows"


def test_decoding_moves_no_window():
    """In the last window a step writes nothing to the device and splits nothing."""
    windows = WindowStates(2, ROW_PAGES, ROW_PAGES, BLOCK_SIZE)
    request = Request(random.Random(3), 0)
    for row in range(2):
        windows.add_row(row, request.features(), request.num_tokens)
    windows.changed.clear()
    for position in range(request.num_tokens, request.num_tokens + 5):
        plan = windows.plan(np.arange(2), np.full(2, position), np.ones(2, dtype=np.int32))
        assert plan.splits is None and not windows.changed


def test_rows_grow():
    windows = WindowStates(1, ROW_PAGES, ROW_PAGES, BLOCK_SIZE)
    request = Request(random.Random(3), 0)
    windows.add_row(0, request.features(), 0)
    before = windows.table[0].copy()
    windows.grow()
    windows.add_row(1, request.features(), 0)
    assert (windows.table[:2] == before).all()
    assert windows.pages_of(1, 0) == windows.pages_of(0, 0)


@pytest.mark.parametrize(("row_pages", "error"), [(8, "need 9 pages; a row has 8"), (9, "9 pages; a step has 8")])
def test_pages_that_do_not_fit_are_an_error(row_pages, error):
    feature = SimpleNamespace(mm_position=SimpleNamespace(offset=1, get_num_embeds=lambda: 9 * BLOCK_SIZE))
    with pytest.raises(RuntimeError, match=error):
        WindowStates(1, row_pages, 8, BLOCK_SIZE).add_row(0, [feature], 0)


@pytest.mark.skipif(not USE_TRITON, reason="runs in the process that the first test starts")
def test_padding_has_no_image():
    """Segments beyond the requests, as a decode graph has them, are empty and see nothing."""
    worker = Worker(random.Random(7), num_rows=4)
    _, tensors, batch, _ = worker.step(num_padding=3)
    first_positions, text_starts, num_pages, requests = tensors.fields[:, len(batch) :].tolist()
    assert first_positions == text_starts == num_pages == [0] * 3
    assert requests == [len(batch), len(batch) + 1, len(batch) + 2]


@pytest.mark.skipif(not USE_TRITON, reason="runs in the process that the first test starts")
@pytest.mark.parametrize("seed", range(3))
def test_segments_of_a_graph(seed):
    """Those of a step stand first; the next has the padding tokens, sees nothing, and the rest is empty."""
    rng = random.Random(seed)
    worker, num_split = Worker(rng, num_rows=5), 0
    for _ in range(12):
        plan, tensors, batch, counts = worker.step(num_graph_padding=4)
        check_step(plan, tensors, batch, counts)
        num_split += plan.splits is not None
        num_tokens, last = plan.num_tokens, plan.num_segments
        starts = tensors.query_start_loc.tolist()
        assert starts[last:] == [num_tokens] + [num_tokens + 4] * (num_tokens + 4 - last)
        first_positions, text_starts, num_pages, requests = tensors.fields[:, last:].tolist()
        assert set(first_positions) == set(num_pages) == set(requests) == {0}
        assert text_starts == [4] + [0] * (num_tokens + 3 - last), "the last padding token is before its window"
        worker.advance(batch, counts)
    assert num_split, "no step had tokens of several windows"


@pytest.mark.skipif(not USE_TRITON, reason="runs in the process that the first test starts")
def test_made_up_batch_reads_no_row():
    """Warm-up batches have rows that are somebody else's: as many segments, no image, windows that start at 0."""
    state = torch.full((2, 3 + ROW_PAGES), 9, dtype=torch.int32, device=DEVICE)
    query_start_loc = torch.tensor([0, 2, 3], dtype=torch.int32, device=DEVICE)
    tensors = SegmentTensors.empty(query_start_loc, 1, 4)
    positions = torch.tensor([0, 1, 0, 0], device=DEVICE)
    build_segments(
        tensors, state, torch.arange(2, device=DEVICE), 0, state, positions, None, use_triton=True
    )  # fmt: skip
    assert tensors.fields.tolist() == [[0, 0], [0, 0], [0, 0], [0, 1]]
    assert tensors.relative_positions.tolist() == [0, 1, 0, 0]
    assert SegmentPlan.without_images(np.zeros(2, np.int32), np.array([2, 1])).max_query_len == 2


@pytest.mark.parametrize("sees_text", [False, True], ids=["ca", "ca_tv"])
@pytest.mark.parametrize("kind", ["graph", "eager", "split", "chunks"])
def test_building_waits_for_nothing(kind, sees_text, monkeypatch):
    """On torch's meta device, where whatever needs a value on the host raises; the kernel alone is left out."""
    built = []
    monkeypatch.setattr(attention_metadata, "build_segments", lambda tensors, *args, **kwargs: built.append(tensors))
    num_requests, num_tokens, device = 3, 3 if kind in ("graph", "eager") else 9, torch.device("meta")
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(
            static_forward_context={"layer": SimpleNamespace(sees_text=sees_text)}, max_cudagraph_capture_size=16
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        model_config=SimpleNamespace(max_model_len=64),
    )
    builder = attention_metadata.ImageMetadataBuilder(SimpleNamespace(step_pages=7), ["layer"], config, device)
    plan = SegmentPlan.without_images(np.full(num_requests, 5), np.full(num_requests, num_tokens // num_requests))
    plan = replace(plan, max_pages=2)
    if kind in ("split", "chunks"):
        splits, starts = np.zeros((4, 4), np.int32), np.array([0, 1, 3, 6, 9], np.int32)
        plan = replace(plan, splits=splits, query_start_loc=starts, num_segments=4)
    rows = torch.zeros(num_requests, dtype=torch.int64, device=device)
    state = torch.zeros(8, 3 + ROW_PAGES, dtype=torch.int32, device=device)
    plan = None if kind == "graph" else plan
    builder.step = attention_metadata.Step(plan, rows, num_requests, state, kind in ("graph", "chunks"))
    common = SimpleNamespace(
        query_start_loc=torch.zeros(num_requests + 1, dtype=torch.int32, device=device),
        positions=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        block_table_tensor=torch.zeros(num_requests, ROW_PAGES, dtype=torch.int32, device=device),
        num_actual_tokens=num_tokens,
        max_query_len=16 if kind == "chunks" else num_tokens // num_requests,
    )
    windows = builder.build(0, common).windows
    num_segments = {"split": 4, "chunks": num_tokens}.get(kind, num_requests)
    assert windows.num_segments == num_segments and windows.num_tokens == num_tokens
    assert windows.image_block_table.shape == (num_segments, 7 if builder.step.in_graph else 2)
    assert windows.max_query_len == common.max_query_len
    assert (built[0].relative_positions is not None) == sees_text


@pytest.mark.parametrize(
    ("worker", "support"), [(attention_metadata.GPU_WORKER, "ALWAYS"), ("vllm.Worker", "UNIFORM_SINGLE_TOKEN_DECODE")]
)
def test_graphs_of_any_step_need_our_worker(worker, support):
    """vLLM's own promises a graph of any step nothing of the length of queries: CA would capture decode's kernel."""
    config = SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=worker))
    for builder in (attention_metadata.ImageMetadataBuilder, attention_metadata.TextMetadataBuilder):
        assert builder.get_cudagraph_support(config, None).name == support
