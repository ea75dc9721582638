"""The three rules of a captioner against dense loops that follow the published text word for word."""

import sys

import pytest
import torch

from casa_engine.errors import InputError
from casa_engine.live.caption_logits import (
    CaptionRules,
    CaptionState,
    caption_logits,
    from_dict,
    to_dict,
)

pytestmark = pytest.mark.unit

NUM_TOKENS = 40
STOPS = (2, 7)
RULES = CaptionRules(STOPS, 1.15, 0.99, 5.0, 0.95, 3, 12)


class Published:
    """The processors as they are described: dense vectors, called once for each choice with all ids so far."""

    def __init__(self, rules):
        self.rules, self.counts = rules, torch.zeros(NUM_TOKENS, dtype=torch.float64)

    def __call__(self, input_ids, logits):
        rules, logits = self.rules, logits.double().clone()
        self.counts = self.counts * rules.penalty_decay
        self.counts[input_ids[-1]] += 1
        factor = rules.repetition_penalty ** self.counts.clamp(0, rules.penalty_clamp)
        factor[list(rules.stop_ids)] = 1
        logits = torch.where(logits < 0, logits * factor, logits / factor)
        for stop in rules.stop_ids:
            logits[stop] = logits[stop] / rules.stop_bias if logits[stop] < 0 else logits[stop] * rules.stop_bias
        history, size = input_ids[-rules.ngram_window :], rules.ngram_size
        for start in range(len(history) - size + 1):
            last = history[start + size - 1]
            if history[start : start + size - 1] == history[len(history) - size + 1 :] and last not in rules.stop_ids:
                logits[last] = float("-inf")
        return logits


@pytest.mark.parametrize("seed", range(5))
def test_a_session_of_many_frames(seed):
    generator = torch.Generator().manual_seed(seed)
    published, state, ids = Published(RULES), CaptionState(), []
    unread = [1, 3, 9]
    num_banned = 0
    for _ in range(30):
        chunk = [*unread, 4, 5]
        ids += chunk
        state, generated = state.read(chunk, RULES), []
        before = state
        while not generated or (generated[-1] not in STOPS and len(generated) < 8):
            if generated:
                ids.append(generated[-1])
                state = state.read(generated[-1:], RULES)
            # Few likely tokens, so that n-grams come back.
            logits = torch.randn(NUM_TOKENS, generator=generator)
            logits[10:14] += 4
            state = state.decay_counts(RULES)
            mine, wanted = caption_logits(logits, state, RULES), published(ids, logits)
            torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-6)
            num_banned += int(mine.isinf().sum())
            generated.append(int(torch.multinomial(mine.softmax(-1), 1, generator=generator)))
        assert before.after(generated, RULES) == state
        # The token that was only sampled comes with the next chunk.
        unread = generated[-1:] if generated[-1] in STOPS else [generated[-1], STOPS[0]]
    assert num_banned > 3


def count_steps(state, generated):
    """Return how many bytecodes Python runs for what a generation leaves."""
    num_steps = 0

    def trace(frame, event, _):
        nonlocal num_steps
        frame.f_trace_opcodes = True
        num_steps += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        state.after(generated, RULES)
    finally:
        sys.settrace(before)
    return num_steps


def test_the_work_of_a_token_does_not_grow_with_what_is_remembered():
    """Counted in steps of Python: those of 20 tokens more are as many with 10 counts as with 2,000."""
    more = []
    for num_counts in (10, 2000):
        state = CaptionState(dict.fromkeys(range(100, 100 + num_counts), 1.0), (5, 6))
        short, long = (count_steps(state, list(range(10, 10 + length))) for length in (10, 30))
        more.append(long - short)
    assert more[0] == more[1] > 0


def test_off_means_off():
    rules = CaptionRules(STOPS)
    assert rules.is_neutral
    logits, state = torch.randn(NUM_TOKENS), CaptionState({3: 2.0}, (3, 4, 3, 4)).decay_counts(rules)
    assert state.counts == {3: 2.0}
    assert torch.equal(caption_logits(logits, state, rules), logits)


def test_the_argument_is_left_alone():
    logits = torch.randn(NUM_TOKENS)
    kept = logits.clone()
    caption_logits(logits, CaptionState({3: 2.0}, (3,)), RULES)
    assert torch.equal(logits, kept)


def test_a_gram_of_one_bans_the_window():
    rules = CaptionRules(STOPS, ngram_size=1, ngram_window=3)
    state = CaptionState().read([8, 9, 2, 10, 11], rules)
    assert state.recent == (2, 10, 11)
    banned = caption_logits(torch.zeros(NUM_TOKENS), state, rules).isinf().nonzero().flatten().tolist()
    assert banned == [10, 11]


def test_forgotten_counts_leave():
    rules = CaptionRules(STOPS, repetition_penalty=1.1, penalty_decay=0.5)
    state = CaptionState().read([8], rules).decay_counts(rules).read([9], rules)
    for _ in range(60):
        state = state.decay_counts(rules)
    assert list(state.counts) == [9]


def test_plain_values_and_back():
    state = CaptionState({3: 0.123456789012345, 8: 1.0}, (3, 8, 3))
    assert from_dict(to_dict(state, RULES)) == (state, RULES)


NO_IDS = "of a live session is no list of token ids"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"counts": [[1, 2], [1.0]]}, "as many numbers from 0 as ids"),
        ({"counts": [["1"], [1.0]]}, f"counts {NO_IDS}"),
        ({"counts": [[1], [float("nan")]]}, "as many numbers from 0 as ids"),
        ({"counts": 3}, "counts of a live session are no pair of lists"),
        ({"recent": [-1]}, f"recent {NO_IDS}"),
        ({"recent": "1"}, f"recent {NO_IDS}"),
        ({"stop_ids": [2.0]}, f"stop_ids {NO_IDS}"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"ngram_size": 2.5}, "ngram_size is 2.5"),
        ({"ngram_window": 0}, "ngram_window is 0"),
        ({"more": 1}, "expected an object with exactly"),
    ],
)
def test_broken_plain_values_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        from_dict({**to_dict(CaptionState({3: 1.0}, (3,)), RULES), **change})


def test_tokens_beyond_the_logits_are_passed_over():
    rules = CaptionRules((2, 900), 1.2, stop_bias=0.5, ngram_size=1)
    state = CaptionState({800: 1.0}, (800, 5))
    assert caption_logits(torch.ones(NUM_TOKENS), state, rules)[5] == float("-inf")


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_no_settings_overflow(penalty):
    rules = CaptionRules(STOPS, penalty, 1.0, 1000.0)
    state = CaptionState({5: 900.0, 6: 1.0}, (5, 6))
    changed = caption_logits(torch.tensor([-20.0, 0.0, 20.0] * 10), state, rules)
    assert changed.isfinite().all()
