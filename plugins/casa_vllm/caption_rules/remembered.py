"""What a chunk brings to the captioner's rules, as arrays that are ready for the chunk's next choice."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from casa_engine.live.caption_logits import CaptionRules, CaptionState, count_tokens
from casa_vllm.caption_rules.tensors import NEUTRAL_NUMBERS


@dataclass(frozen=True)
class RememberedRow:
    """One request's rules and state, counts already decayed for its next choice.

    Attributes:
        ids: (N,) int32, remembered tokens in ascending order, no stop tokens.
        counts: (N,) float64, above 0.
        recent: (R,) int32, the last tokens of the text, at most the window; empty without an n-gram rule.
        stop_ids: (K,) int32, each once.
        ngram: n and window; n is 0 without the rule.
        numbers: decay, logarithm of the penalty, clamp, stop bias: `RuleTensors.numbers`.
    """

    ids: np.ndarray
    counts: np.ndarray
    recent: np.ndarray
    stop_ids: np.ndarray
    ngram: tuple[int, int]
    numbers: tuple[float, float, float, float]

    @classmethod
    def neutral(cls) -> "RememberedRow":
        """Return a row without rules."""
        nothing = np.empty(0, np.int32)
        return cls(nothing, np.empty(0), nothing, nothing, (0, 0), NEUTRAL_NUMBERS)

    @classmethod
    def of_chunk(cls, state: CaptionState, rules: CaptionRules, output_ids: Sequence[int]) -> "RememberedRow":
        """Return the row of a chunk that has generated `output_ids` so far (a resumed request has some).

        Equal to `state.decay_counts(rules)` and, for each output, `read` and `decay_counts`.
        """
        stop_ids = np.array(list(dict.fromkeys(rules.stop_ids)), np.int32)
        ids, counts = np.empty(0, np.int32), np.empty(0)
        if rules.repetition_penalty != 1:
            ids, counts = _decayed(state, rules, output_ids)
        size, recent = rules.ngram_size, ()
        if size:
            recent = (*state.recent, *output_ids)[-rules.ngram_window :]
        return cls(
            ids,
            counts,
            np.array(recent, np.int32),
            stop_ids,
            (size, rules.ngram_window if size else 0),
            (rules.penalty_decay, math.log(rules.repetition_penalty), rules.penalty_clamp, rules.stop_bias),
        )


def _decayed(state: CaptionState, rules: CaptionRules, output_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and counts, without stop tokens, whose counts no rule reads."""
    ids, counts = count_tokens(state.counts, [*state.recent[-1:], *output_ids], rules.penalty_decay)
    kept = np.flatnonzero(~np.isin(ids, rules.stop_ids))
    # In ascending order a row's logits are read from one end to the other: fewer pages of memory at once.
    kept = kept[np.argsort(ids[kept])]
    return ids[kept].astype(np.int32), counts[kept]
