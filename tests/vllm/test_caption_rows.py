"""The captioner's rules at vLLM's two samplers: rows follow what each of them says of its batch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from casa_engine.live.caption_logits import CaptionRules, CaptionState, caption_logits, to_dict

pytestmark = pytest.mark.vllm
V = 32
RULES = CaptionRules((2,), 1.3, 0.9, 5.0, 0.8, 2, 20)
STATE = CaptionState().read([5, 6, 7], RULES)


def params(state=STATE):
    from vllm import SamplingParams

    return SamplingParams(extra_args={"casa_live": to_dict(state, RULES)})


def first_runner(num_rows):
    """The processor of an engine of so many sequences."""
    from casa_vllm.caption_processor import CaptionLogitsProcessor

    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=num_rows))
    return CaptionLogitsProcessor(config, torch.device("cpu"), False)


def second_runner(num_rows, **attributes):
    """The sampler of an engine of so many sequences, around one with these attributes."""
    from casa_vllm.v2_caption_sampler import CaptionSampler

    lengths = SimpleNamespace(gpu=torch.zeros(num_rows, dtype=torch.int32))
    states = SimpleNamespace(max_num_reqs=num_rows, device=torch.device("cpu"), prefill_len=lengths)
    return CaptionSampler(SimpleNamespace(req_states=states, **attributes))


def wanted(logits, generated):
    """The row's logits after these tokens, by the reference."""
    return caption_logits(logits, STATE.after([*generated, 0], RULES), RULES)


def test_v1_rows_follow_the_batch():
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    processor = first_runner(num_rows=3)
    assert not processor.is_argmax_invariant()
    outputs: list[int] = []
    added = [(0, SamplingParams(), [1], []), (2, params(), [1], outputs)]
    processor.update_state(BatchUpdate(3, removed=[], added=added, moved=[]))
    index = 2
    for token in (9, 10, 9, 10, 11):
        logits = torch.randn(3, V)
        kept = logits.clone()
        # A chunked prefill samples, and throws away, more than once: the same row again.
        for _ in range(2):
            changed = processor.apply(logits.clone())
        assert torch.equal(changed[index], wanted(kept[index], outputs))
        others = [row for row in range(3) if row != index]
        assert torch.equal(changed[others], kept[others])
        outputs.append(token)
        if token == 10 and index == 2:
            processor.update_state(BatchUpdate(3, [], [], [(2, 1, MoveDirectionality.UNIDIRECTIONAL)]))
            index = 1
    # Preempted and resumed: all at once from what vLLM holds.
    processor.update_state(BatchUpdate(3, removed=[1], added=[], moved=[]))
    assert torch.equal(processor.apply(kept.clone()), kept)
    processor.update_state(BatchUpdate(3, removed=[], added=[(0, params(), [1], outputs)], moved=[]))
    assert torch.equal(processor.apply(kept.clone())[0], wanted(kept[0], outputs))


# Where the second runner has put its requests.
ROWS = {"chat": 1, "live": 0}


def batch(sampler, *rows):
    """What `CaptionSampler` reads of a step of the second runner: (request, prefill length, computed, last id)."""
    names, prefill, computed, last = zip(*rows, strict=True)
    at = [ROWS[name] for name in names]
    sampler.req_states.prefill_len.gpu[at] = torch.tensor(prefill, dtype=torch.int32)
    return SimpleNamespace(
        idx_mapping=torch.tensor(at),
        idx_mapping_np=np.array(at),
        # A step computes one token of each request; the runner's buffer is as long as its graphs.
        seq_lens=torch.tensor([*(number + 1 for number in computed), 0, 0], dtype=torch.int32),
        input_ids=torch.tensor(last, dtype=torch.int32),
        logits_indices=torch.arange(len(last)),
    )


def sent(name, parameters, prompt_len, prefill):
    return SimpleNamespace(req_id=name, sampling_params=parameters, prompt_len=prompt_len, prefill_token_ids=prefill)


def test_v1_rows_are_freed_moved_and_swapped():
    """Ten times as many sessions as rows, in an order of vLLM's: added, then removed, then moved."""
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    rng = np.random.default_rng(0)
    processor, batch_rows = first_runner(num_rows=4), [None] * 4
    for _ in range(120):
        added, removed, moved = [], [], []
        index = int(rng.integers(4))
        if rng.random() < 0.5:
            # vLLM puts new requests where old ones were, and names only what stays empty as removed.
            batch_rows[index] = [] if rng.random() < 0.8 else None
            added = [(index, params() if batch_rows[index] is not None else None, [1], batch_rows[index])]
        elif rng.random() < 0.4:
            batch_rows[index] = None
            removed = [index]
        first, second = rng.permutation(4)[:2].tolist()
        if rng.random() < 0.3:
            batch_rows[first], batch_rows[second] = batch_rows[second], batch_rows[first]
            moved = [(first, second, MoveDirectionality.SWAP)]
        elif rng.random() < 0.3:
            batch_rows[first], batch_rows[second] = None, batch_rows[first]
            moved = [(first, second, MoveDirectionality.UNIDIRECTIONAL)]
        processor.update_state(BatchUpdate(4, removed=removed, added=added, moved=moved))
        logits = torch.randn(4, V)
        kept = logits.clone()
        processor.apply(logits)
        for mine, before, outputs in zip(logits, kept, batch_rows, strict=True):
            assert torch.equal(mine, before if outputs is None else wanted(before, outputs))
        for outputs in batch_rows:
            if outputs is not None:
                outputs.append(int(rng.integers(5, 10)))


def test_v2_rows_follow_the_batch():
    sampler = second_runner(num_rows=2, compute_nans=False)
    assert sampler.compute_nans is False
    sampler.add_row(ROWS["chat"], sent("chat", None, 3, [5, 6, 7]))
    sampler.add_row(ROWS["live"], sent("live", params(), 3, [5, 6, 7]))
    logits = torch.randn(2, V).bfloat16()
    assert sampler.apply_rules(logits[:1], batch(sampler, ("chat", 3, 0, 7))).dtype == torch.bfloat16
    kept = logits.clone()
    # The prompt in two pieces, then three tokens.
    outputs: list[int] = []
    for computed, last in ((0, 6), (2, 7), (3, 9), (4, 10), (5, 9)):
        outputs += [last] if computed >= 3 else []
        changed = sampler.apply_rules(logits, batch(sampler, ("chat", 3, 3, 8), ("live", 3, computed, last)))
        assert torch.equal(changed[1], wanted(kept[1].float(), outputs))
        assert torch.equal(changed[0], kept[0].float())
        assert torch.equal(logits, kept)
    # Resumed after a preemption, the chunk's own output is sent with it.
    sampler.remove_row("live")
    sampler.add_row(ROWS["live"], sent("live", params(), 3, [5, 6, 7, *outputs]))
    changed = sampler.apply_rules(logits, batch(sampler, ("chat", 3, 9, 8), ("live", 6, 0, 9)))
    assert torch.equal(changed[1], wanted(kept[1].float(), outputs))
    sampler.remove_row("live")
    assert sampler.apply_rules(logits, batch(sampler, ("chat", 3, 9, 8), ("live", 6, 6, 9))) is logits


def test_v2_profiling_samples_as_with_a_session_and_as_without():
    """The first call is vLLM's: it counts the copy that a session causes, and compiles the sampler for both types."""
    from casa_vllm.v2_caption_sampler import CaptionSampler

    types = []

    class Sampler:
        req_states = SimpleNamespace(max_num_reqs=2, device=torch.device("cpu"))

        def __call__(self, logits, input_batch):
            types.append(logits.dtype)
            return logits

    sampler, logits = CaptionSampler(Sampler()), torch.randn(2, V).bfloat16()
    nobody = SimpleNamespace(idx_mapping_np=np.array([-1]))
    for _ in range(2):
        assert sampler(logits, nobody) is logits
    assert types == [torch.float32, torch.bfloat16, torch.bfloat16]


POISON = (
    *(None, True, -1, 1e400, float("nan"), 10**400, "x", "x" * 10_000, b"x", [], {}, [[]], [None], [True], [-1], [0.5]),
    *([10**400], ["5"], [[1], None], [[1], 5], [[1], ["a"]], [[1], [None]], [[1], [True]], [[1], [float("nan")]]),
    *([[1], [-1.0]], [[1], [10**400]], [[1, 2], [1.0]], [None, [1.0]], [[[]], [1.0]], {"ids": [1]}, list(range(400))),
)


def poisoned_states():
    """Each field of a good state replaced by each poison, left out, or joined by another."""
    good = to_dict(STATE, RULES)
    yield from POISON
    yield {**good, "x" * 10_000: 1}
    for name in good:
        yield {key: value for key, value in good.items() if key != name}
        for poison in POISON:
            yield {**good, name: poison}
    yield {**good, "recent": [1] * 21}
    yield {**good, "stop_ids": [1] * 10_000}
    yield {**good, "counts": [[1] * 300_000, [1.0] * 300_000]}


def test_whatever_a_client_sends_is_refused_or_harmless():
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.sample.logits_processor import BatchUpdate, validate_logits_processors_parameters

    from casa_vllm.caption_processor import CaptionLogitsProcessor

    validate_logits_processors_parameters([CaptionLogitsProcessor], params())
    validate_logits_processors_parameters([CaptionLogitsProcessor], SamplingParams())
    num_refused = num_taken = 0
    for state in poisoned_states():
        if state is None:
            continue
        try:
            sampling = SamplingParams(extra_args={"casa_live": state})
        except VLLMValidationError:  # 0.32 bounds integers itself.
            num_refused += 1
            continue
        second = second_runner(num_rows=1)
        # V2 has nothing that validates a request: there it goes on without a state.
        second.add_row(0, sent("live", sampling, 3, [5, 6, 7]))
        try:
            # What `SamplingParams.verify` calls; the server answers this error with a 400.
            validate_logits_processors_parameters([CaptionLogitsProcessor], sampling)
        except VLLMValidationError as error:
            assert len(str(error)) < 600
            assert not second._rows
            num_refused += 1
            continue
        # A good value for this field after all: nothing may raise where it is used.
        num_taken += 1
        first = first_runner(num_rows=1)
        first.update_state(BatchUpdate(1, [], [(0, sampling, [1], [9, 10])], []))
        assert not first.apply(torch.randn(1, V)).isnan().any()
        assert not second.apply_rules(torch.randn(1, V), batch(second, ("live", 3, 3, 8))).isnan().any()
    assert num_refused > 150
    assert num_taken < 20
