"""The captioner's rules for whole batches, in NumPy and as Triton kernels, against the Python rules, bit for bit.

The Triton kernels run here too, under Triton's interpreter, in a process of their own: the interpreter has to be
switched on before triton is imported and must not reach other tests.
"""

import os
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from casa_engine.live.caption_logits import CaptionRules, CaptionState, caption_logits
from casa_vllm.caption_rules import CaptionTable
from casa_vllm.caption_rules.remembered import RememberedRow
from casa_vllm.caption_rules.tensors import FIRST_PAGES, PAGE
from interpreter_process import check_under_interpreter

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
USE_TRITON = IS_INTERPRETED or torch.cuda.is_available()
DEVICE = torch.device("cuda" if USE_TRITON and not IS_INTERPRETED else "cpu")
NUM_LOGITS = 50
RULES = CaptionRules((2, 7), 1.15, 0.99, 5.0, 0.95, 3, 12)


@dataclass
class Session:
    """A live session as the reference knows it: what its chunk brought, and what it generated since."""

    rules: CaptionRules
    sent: CaptionState
    outputs: list[int] = field(default_factory=list)

    @property
    def state(self) -> CaptionState:
        return self.sent.after([*self.outputs, 0], self.rules)


class Batches:
    """A table and the sessions in its rows; each step is compared with the reference."""

    def __init__(self, num_rows=6, num_logits=NUM_LOGITS, dtype=torch.float32, seed=0):
        self.table = CaptionTable(num_rows, DEVICE, use_triton=USE_TRITON)
        self.rng = np.random.default_rng(seed)
        self.sessions: dict[int, Session] = {}
        self.num_rows, self.num_logits, self.dtype = num_rows, num_logits, dtype
        self.num_banned = 0

    def write(self, row, rules, state, outputs=()):
        self.sessions[row] = Session(rules, state, list(outputs))
        self.table.write(row, RememberedRow.of_chunk(state, rules, list(outputs)))

    def clear(self, row):
        self.sessions.pop(row, None)
        self.table.clear(row)

    def step(self, rows, new_ids):
        """One batch: the table's row of each of its rows, and the token that it sampled last; -1 for none."""
        for row, token in zip(rows, new_ids, strict=True):
            if token >= 0 and row in self.sessions:
                self.sessions[row].outputs.append(token)
        # The columns beyond are padding of the vocabulary, which vLLM cuts off.
        drawn = self.rng.standard_normal((len(rows), self.num_logits + 14)) * 4
        padded = torch.from_numpy(drawn).to(DEVICE, self.dtype)
        logits = padded[:, : self.num_logits]
        expected = [self._expect(row, each.cpu().float()) for row, each in zip(rows, logits, strict=True)]
        on_device = torch.tensor([rows, new_ids], device=DEVICE)
        beyond = padded[:, self.num_logits :].clone()
        self.table.apply(logits, *on_device, np.array(rows))
        for row, mine, wanted in zip(rows, logits.cpu(), expected, strict=True):
            assert torch.equal(mine, wanted.to(self.dtype)), self.sessions.get(row)
        assert torch.equal(padded[:, self.num_logits :], beyond)
        self.num_banned += int(logits.isinf().sum())

    def _expect(self, row, logits):
        session = self.sessions.get(row)
        return logits if session is None else caption_logits(logits, session.state, session.rules)


def random_rules(rng):
    """Rules of all kinds: each off or at its limits, stop tokens twice or beyond the logits."""
    pick = rng.choice
    return CaptionRules(
        tuple(int(token) for token in rng.integers(0, NUM_LOGITS + 8, rng.integers(0, 6))),
        float(pick([1.0, 1.15, 0.5, 100.0])),
        float(pick([0.0, 0.5, 0.99, 1.0])),
        float(pick([0.0, 1.5, 5.0, 1000.0])),
        float(pick([1.0, 0.95, 1.2, 0.01])),
        int(pick([0, 1, 2, 3, 4, 9])),
        int(pick([1, 2, 3, 12, 60])),
    )


def random_state(rng, rules):
    """Counts and text of a session that has run for a while, or has just begun."""
    ids = rng.permutation(NUM_LOGITS + 8)[: rng.integers(0, NUM_LOGITS)].tolist()
    counts = dict(zip(ids, (rng.random(len(ids)) * 7).tolist(), strict=True))
    recent = rng.integers(0, 8, rng.integers(0, 70)).tolist()
    return CaptionState(counts if rng.random() < 0.8 else {}).read(recent, rules)


@pytest.mark.parametrize("seed", range(3 if IS_INTERPRETED else 12))
def test_random_sessions(seed):
    """Rows join, leave, begin another chunk, are resumed and stand anywhere in a batch, each with rules of its own."""
    batches = Batches(seed=seed)
    rng = batches.rng
    for row in range(batches.num_rows):
        rules = replace(random_rules(rng), ngram_size=row % 4, ngram_window=12)
        batches.write(row, rules, random_state(rng, rules))
    for _ in range(25 if IS_INTERPRETED else 60):
        for row in range(batches.num_rows):
            event = rng.random()
            if event < 0.02:
                batches.clear(row)
            elif event < 0.1:
                rules = random_rules(rng)
                outputs = rng.integers(0, 8, rng.integers(0, 5)).tolist()
                batches.write(row, rules, random_state(rng, rules), outputs)
        rows = [int(row) if rng.random() < 0.9 else -1 for row in rng.permutation(batches.num_rows)]
        rows = rows[: rng.integers(1, len(rows) + 1)]
        # Few tokens, so that n-grams come back; now and then one that the logits do not have, or none.
        drawn = np.where(rng.random(len(rows)) < 0.9, rng.integers(0, 4, len(rows)), NUM_LOGITS + 3)
        batches.step(rows, np.where(rng.random(len(rows)) < 0.85, drawn, -1).tolist())
    assert batches.num_banned > 5


def test_a_session_of_several_frames():
    """As a session goes: each chunk brings the state that the last one has left."""
    batches, state = Batches(num_rows=1, seed=1), CaptionState()
    for _ in range(12):
        state = state.read([3, 9, int(batches.rng.integers(0, 9))], RULES)
        batches.write(0, RULES, state)
        batches.step([0], [-1])
        for token in batches.rng.integers(0, 9, 5).tolist():
            batches.step([0], [token])
        state = state.after([*batches.sessions[0].outputs, 2], RULES)
    assert batches.num_banned > 5


def test_a_token_is_counted_once_however_often_its_step_is_sampled():
    batches = Batches(num_rows=1)
    batches.write(0, RULES, CaptionState({5: 2.5}).read([5, 6], RULES))
    for token in (9, -1, -1, 9, -1):
        batches.step([0], [token])


def test_rows_that_outgrow_their_pages():
    """More tokens than the pool begins with, and a page that is begun while a chunk is said."""
    num_rows, num_ids = 2, 2 * FIRST_PAGES * PAGE + 100
    batches = Batches(num_rows, num_logits=num_ids + 500)
    rules = replace(RULES, penalty_decay=1.0)
    many = CaptionState({token: 1.0 + token % 3 for token in range(500, 500 + num_ids)}).read([500], rules)
    batches.write(0, rules, many)
    few = CaptionState({token: 1.0 for token in range(8, PAGE + 6)}).read([8], rules)
    batches.write(1, rules, few)
    for token in range(PAGE + 100, PAGE + 106):
        batches.step([1, 0], [token, token - 100])
    # The pages of the row that leaves are another's now, and hold nothing of it.
    batches.clear(0)
    batches.write(0, rules, few)
    batches.step([0, 1], [-1, PAGE + 200])


@pytest.mark.parametrize("state", [CaptionState(), CaptionState({5: 1.0}), CaptionState({}, (5, 5, 5))])
@pytest.mark.parametrize(
    "rules",
    [
        CaptionRules((5,), ngram_size=1),
        CaptionRules((), 1.3, ngram_size=4, ngram_window=3),
        CaptionRules((5, 5), stop_bias=0.5),
        CaptionRules((), 0.01, 1.0, 1000.0),
        CaptionRules((), 100.0, 0.0, 0.0),
    ],
    ids=["stop-is-never-banned", "window-shorter-than-n", "stop-twice", "largest-factor", "no-memory"],
)
def test_edges(state, rules):
    batches = Batches(num_rows=2)
    batches.write(1, rules, state)
    for token in (-1, 5, 5, 6, 5, 6, 5):
        batches.step([0, 1], [3, token])


@pytest.mark.skipif(not USE_TRITON, reason="on a CPU the logits are float32 in both samplers")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision(dtype):
    if IS_INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts float32 to bfloat16, where a GPU rounds")
    batches = Batches(num_rows=1, dtype=dtype)
    batches.write(0, RULES, CaptionState({5: 2.5, 8: 0.3}).read([5, 6, 8, 5], RULES))
    for token in (6, 8, 9):
        batches.step([0], [token])


def test_cleared_rows_are_neutral():
    """Model Runner V2 names a row for every request, also for those without rules."""
    batches = Batches(num_rows=2)
    batches.write(0, RULES, CaptionState({5: 2.5}).read([5, 6, 5], RULES))
    batches.step([0, 1], [6, 4])
    batches.clear(0)
    assert not batches.table.has_rules(np.array([0, 1, -1]))
    batches.step([0, 1], [6, 4])


@pytest.mark.skipif(USE_TRITON, reason="this session already runs the Triton kernels")
def test_triton_kernels_under_the_interpreter():
    check_under_interpreter(__file__)


@pytest.mark.vllm
@pytest.mark.skipif(USE_TRITON, reason="replaces the kernels that this session runs")
def test_a_step_on_a_gpu_is_two_kernels_and_waits_for_nothing(monkeypatch):
    """On the meta device every operation that needs a value on the host raises."""
    pytest.importorskip("triton")
    from casa_vllm import v2_caption_sampler
    from casa_vllm.caption_rules import triton_rules

    launched = []
    for name in ("_penalty_kernel", "_ngram_kernel"):

        class Kernel:
            def __class_getitem__(cls, grid, name=name):
                return lambda *arguments, **options: launched.append((name, grid))

        monkeypatch.setattr(triton_rules, name, Kernel)
    monkeypatch.setattr(v2_caption_sampler, "HAS_TRITON", True)
    meta = torch.device("meta")
    lengths = SimpleNamespace(gpu=torch.zeros(3, dtype=torch.int32, device=meta))
    states = SimpleNamespace(max_num_reqs=3, device=meta, prefill_len=lengths)
    sampler = v2_caption_sampler.CaptionSampler(SimpleNamespace(req_states=states))
    # As a chunk with rules is added.
    sampler._table.write(2, RememberedRow.of_chunk(CaptionState({5: 2.0}, (5, 6)), RULES, ()))
    batch = SimpleNamespace(
        idx_mapping=torch.zeros(3, dtype=torch.int64, device=meta),
        idx_mapping_np=np.array([1, 2, 0]),
        seq_lens=torch.zeros(8, dtype=torch.int32, device=meta),
        input_ids=torch.zeros(9, dtype=torch.int32, device=meta),
        logits_indices=torch.zeros(3, dtype=torch.int64, device=meta),
    )
    logits = torch.zeros(3, NUM_LOGITS, dtype=torch.bfloat16, device=meta)
    for _ in range(PAGE + 1):
        launched.clear()
        assert sampler.apply_rules(logits, batch).dtype == torch.float32
        assert launched == [("_penalty_kernel", (3,)), ("_ngram_kernel", (3,))]
    with pytest.raises(RuntimeError):
        logits.sum().item()


KERNELS = {
    "_penalty_kernel": ({"PAGE": PAGE, "BLOCK": 1024}, 8),
    "_ngram_kernel": ({"RING": 4096, "BLOCK": 64}, 1),
}


@pytest.mark.skipif(USE_TRITON, reason="compiled by being run, or interpreted")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile(name, dtype, capability):
    """Down to machine code of an A100, H100 or H200, B200: needs no GPU."""
    pytest.importorskip("triton")
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from casa_vllm.caption_rules import triton_rules

    kernel = getattr(triton_rules, name)
    constants, num_warps = KERNELS[name]
    pointers = {"logits_ptr": f"*{dtype}", "rows_ptr": "*i64", "counts_ptr": "*fp64", "numbers_ptr": "*fp64"}
    signature = {
        each: "constexpr" if each in constants else pointers.get(each, "*i32" if each.endswith("_ptr") else "i32")
        for each in kernel.arg_names
    }
    indexes = {(kernel.arg_names.index(each),): value for each, value in constants.items()}
    compiled = compile_kernel(
        ASTSource(kernel, signature, constexprs=indexes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "enable_fp_fusion": False},
    )
    assert compiled.asm["cubin"]
    if name == "_penalty_kernel":
        # Divisions that round to nearest; a multiplication and an addition that round apart.
        assert "div.rn.f32" in compiled.asm["ptx"]
        assert "div.full.f32" not in compiled.asm["ptx"]


@pytest.mark.skipif(USE_TRITON, reason="compiled by being run, or interpreted")
def test_no_step_compiles_a_kernel_again():
    """Batches of any size, at any address, of any width, with tables of any width, are one variant of a kernel."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from casa_vllm.caption_rules import triton_rules

    backend = make_backend(GPUTarget("cuda", 90, 32))
    for name, (constants, _) in KERNELS.items():
        kernel = getattr(triton_rules, name)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        variants = set()
        for number in (1, 16, 17, 4096):
            # A view into a larger tensor begins anywhere.
            at = torch.zeros(40, dtype=torch.int32)[number % 16 :]
            whole = torch.zeros(40, dtype=torch.int32)
            values = {each: whole if each.endswith("_ptr") else number for each in kernel.arg_names} | constants
            values |= {each: at for each in triton_rules.VARYING if each in values and each.endswith("_ptr")}
            _, specialization, _ = bind(**values)
            variants.add(str(specialization))
        assert len(variants) == 1, variants
