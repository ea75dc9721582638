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


def wanted(logits, generated):
    """The row's logits after these tokens, by the reference."""
    return caption_logits(logits, STATE.after([*generated, 0], RULES), RULES)


def test_v1_rows_follow_the_batch():
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from casa_vllm.caption_processor import CaptionLogitsProcessor

    processor = CaptionLogitsProcessor(None, torch.device("cpu"), False)
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


class Batch(SimpleNamespace):
    """What `CaptionSampler` reads of a step of the second runner: (request, prefill length, computed, last id)."""

    def __init__(self, *rows):
        names, prefill, computed, last = zip(*rows, strict=True)
        super().__init__(
            req_ids=list(names),
            prefill_len_np=np.array(prefill),
            num_computed_tokens_np=np.array(computed),
            input_ids=torch.tensor(last),
            logits_indices=torch.arange(len(last)),
        )


def sent(name, parameters, prompt_len, prefill):
    return SimpleNamespace(req_id=name, sampling_params=parameters, prompt_len=prompt_len, prefill_token_ids=prefill)


def test_v2_rows_follow_the_batch():
    from casa_vllm.v2_caption_sampler import CaptionSampler

    inner = SimpleNamespace(compute_nans=False)
    sampler = CaptionSampler(inner)
    assert sampler.compute_nans is False
    sampler.add_row(sent("chat", None, 3, [5, 6, 7]))
    sampler.add_row(sent("live", params(), 3, [5, 6, 7]))
    logits = torch.randn(2, V).bfloat16()
    assert sampler.apply_rules(logits[:1], Batch(("chat", 3, 0, 7))).dtype == torch.bfloat16
    kept = logits.clone()
    # The prompt in two pieces, then three tokens.
    outputs: list[int] = []
    for computed, last in ((0, 6), (2, 7), (3, 9), (4, 10), (5, 9)):
        outputs += [last] if computed >= 3 else []
        changed = sampler.apply_rules(logits, Batch(("chat", 3, 3, 8), ("live", 3, computed, last)))
        assert torch.equal(changed[1], wanted(kept[1].float(), outputs))
        assert torch.equal(changed[0], kept[0].float())
        assert torch.equal(logits, kept)
    # Resumed after a preemption, the chunk's own output is sent with it.
    sampler.add_row(sent("live", params(), 3, [5, 6, 7, *outputs]))
    changed = sampler.apply_rules(logits, Batch(("chat", 3, 9, 8), ("live", 6, 0, 9)))
    assert torch.equal(changed[1], wanted(kept[1].float(), outputs))
    sampler.remove_row("live")
    assert sampler.apply_rules(logits, Batch(("chat", 3, 9, 8), ("live", 6, 6, 9))) is logits


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
    from casa_vllm.v2_caption_sampler import CaptionSampler

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
        second = CaptionSampler(SimpleNamespace())
        # V2 has nothing that validates a request: there it goes on without a state.
        second.add_row(sent("live", sampling, 3, [5, 6, 7]))
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
        first = CaptionLogitsProcessor(None, torch.device("cpu"), False)
        first.update_state(BatchUpdate(1, [], [(0, sampling, [1], [9, 10])], []))
        assert not first.apply(torch.randn(1, V)).isnan().any()
        second.apply_rules(torch.randn(1, V), Batch(("live", 3, 3, 8)))
    assert num_refused > 150
    assert num_taken < 20
