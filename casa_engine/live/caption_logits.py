"""How a captioner's next token is chosen: three changes of the logits, in the published order.

    1. repetition penalty     tokens said lately lose, the more the more often; counts fade by moving average
    2. stop bias              the stop tokens lose a little
    3. windowed n-gram ban    no n-gram of the last tokens is completed a second time

What they remember lives as long as the session: `CaptionState`, a plain value that the session keeps and hands over
with every chunk. Nothing is kept where the logits are made, so that a request that is preempted, restarted or resumed
goes on exactly as it would have.

    chunk read     state.read(chunk ids)
    each token     state.decay_counts() -> caption_logits(...) -> token -> state.read([token]) when it is fed again

The token that ends a frame is never fed in it: it is read with the next chunk, whose first token it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from casa_engine.errors import InputError
from casa_engine.live.settings import LiveSettings, shown

# A count this small changes a logit by less than a float32 can tell (for any penalty that makes sense).
MIN_COUNT = 1e-8
# Largest logarithm of a penalty; a logit times e^60 is still a float32.
MAX_LOG_PENALTY = 60.0
# Where state and rules travel in the extra arguments of a request.
EXTRA_ARG = "casa_live"
# Most entries that a request may bring: a vocabulary, and the stop tokens of any model. Every token walks them.
MAX_COUNTS = 2**18
MAX_STOP_IDS = 256
# Fields of `CaptionRules` that are settings of the same name.
RULE_NUMBERS = (
    "repetition_penalty",
    "penalty_decay",
    "penalty_clamp",
    "stop_bias",
    "ngram_size",
    "ngram_window",
)


@dataclass(frozen=True)
class CaptionRules:
    """The numbers of `LiveSettings` that change logits, and the stop ids they speak of."""

    stop_ids: tuple[int, ...]
    repetition_penalty: float = 1.0
    penalty_decay: float = 0.99
    penalty_clamp: float = 5.0
    stop_bias: float = 1.0
    ngram_size: int = 0
    ngram_window: int = 60

    @classmethod
    def from_settings(cls, settings: LiveSettings, stop_ids: Sequence[int]) -> "CaptionRules":
        """The rules of a session."""
        return cls(tuple(stop_ids), **{name: getattr(settings, name) for name in RULE_NUMBERS})

    @property
    def is_neutral(self) -> bool:
        """Whether the rules change no logits."""
        return self.repetition_penalty == 1 and self.stop_bias == 1 and self.ngram_size == 0


@dataclass(frozen=True)
class CaptionState:
    """State of the rules in a session.

    Attributes:
        counts: Decayed number of occurrences by token id.
        recent: The last `ngram_window` ids of the text.
    """

    counts: dict[int, float] = field(default_factory=dict)
    recent: tuple[int, ...] = ()

    def read(self, token_ids: Sequence[int], rules: CaptionRules) -> "CaptionState":
        """The state after more text."""
        return CaptionState(self.counts, (*self.recent, *token_ids)[-rules.ngram_window :])

    def decay_counts(self, rules: CaptionRules) -> "CaptionState":
        """The state for the next choice: counts decay, and the last token read is counted."""
        if rules.repetition_penalty == 1 or not self.recent:
            return self
        decay = rules.penalty_decay
        counts = {token: count * decay for token, count in self.counts.items() if count * decay > MIN_COUNT}
        last = self.recent[-1]
        counts[last] = counts.get(last, 0.0) + 1.0
        return CaptionState(counts, self.recent)

    def after(self, generated: Sequence[int], rules: CaptionRules) -> "CaptionState":
        """The state after a generation, whose last token is read with the next chunk.

        Equal to `decay_counts`, and `read` and `decay_counts` for each token but the last. Python walks the counts once
        a generation, not once a token: a captioner that has talked for long remembers a thousand of them.
        """
        if not generated:
            return self
        state = self.read(generated[:-1], rules)
        if rules.repetition_penalty == 1:
            return state
        ids, amounts = count_tokens(self.counts, [*self.recent[-1:], *generated[:-1]], rules.penalty_decay)
        return CaptionState(dict(zip(ids.tolist(), amounts.tolist(), strict=True)), state.recent)


def count_tokens(counts: Mapping[int, float], token_ids: Sequence[int], decay: float) -> tuple[np.ndarray, np.ndarray]:
    """Count tokens one after the other; before each, all counts decay, and one that has become too small is 0.

    Returns:
        Ids (N,) int64 and their counts (N,) float64, above 0.
    """
    places = {token: place for place, token in enumerate(dict.fromkeys([*counts, *token_ids]))}
    amounts = np.zeros(len(places))
    amounts[: len(counts)] = np.fromiter(counts.values(), np.float64, len(counts))
    for token in token_ids:
        amounts *= decay
        amounts[amounts <= MIN_COUNT] = 0
        amounts[places[token]] += 1
    kept = np.flatnonzero(amounts)
    return np.fromiter(places, np.int64, len(places))[kept], amounts[kept]


def caption_logits(logits: Tensor, state: CaptionState, rules: CaptionRules) -> Tensor:
    """Apply the rules.

    Args:
        logits: float32 (V,).
        state: Its counts already decayed for this choice.
        rules: What to apply.

    Returns:
        float32 (V,), new; banned tokens are -inf.
    """
    logits = logits.clone()
    if rules.repetition_penalty != 1:
        _penalise(logits, state, rules)
    if rules.stop_bias != 1:
        # Of a known type: there may be none, and an empty list makes floats.
        stops = torch.tensor(_within(rules.stop_ids, logits), dtype=torch.long, device=logits.device)
        chosen = logits[stops]
        logits[stops] = torch.where(chosen < 0, chosen / rules.stop_bias, chosen * rules.stop_bias)
    banned = _within(banned_tokens(state.recent, rules), logits)
    if banned:
        logits[torch.tensor(banned, device=logits.device)] = float("-inf")
    return logits


def banned_tokens(recent: Sequence[int], rules: CaptionRules) -> list[int]:
    """Tokens that would complete an n-gram of the window a second time; never stop tokens."""
    size = rules.ngram_size
    if size == 0 or len(recent) < size:
        return []
    recent = tuple(recent)
    last = recent[len(recent) - size + 1 :]
    ends = range(size - 1, len(recent))
    banned = {recent[end] for end in ends if recent[end - size + 1 : end] == last}
    return sorted(banned.difference(rules.stop_ids))


def _penalise(logits: Tensor, state: CaptionState, rules: CaptionRules) -> None:
    """Divide positive logits of what was said, multiply negative ones. Mutates `logits`."""
    tokens = _within([token for token in state.counts if token not in rules.stop_ids], logits)
    if not tokens:
        return
    clamp = rules.penalty_clamp
    strength = math.log(rules.repetition_penalty)
    # Bounded: a client's settings must not overflow, they would take the engine along.
    penalties = (min(state.counts[token], clamp) * strength for token in tokens)
    factors = [math.exp(max(-MAX_LOG_PENALTY, min(MAX_LOG_PENALTY, penalty))) for penalty in penalties]
    ids, factor = torch.tensor(tokens, device=logits.device), torch.tensor(factors, device=logits.device)
    chosen = logits[ids]
    logits[ids] = torch.where(chosen < 0, chosen * factor, chosen / factor)


def _within(token_ids: Sequence[int], logits: Tensor) -> list[int]:
    """The ids that have a logit."""
    return [token for token in token_ids if 0 <= token < len(logits)]


def to_dict(state: CaptionState, rules: CaptionRules) -> dict[str, Any]:
    """State and rules as numbers, lists and dictionaries, to travel with a request."""
    return {
        "counts": [list(state.counts), list(state.counts.values())],
        "recent": list(state.recent),
        "stop_ids": list(rules.stop_ids),
        **{name: getattr(rules, name) for name in RULE_NUMBERS},
    }


def from_dict(plain: Any) -> tuple[CaptionState, CaptionRules]:
    """Read what `to_dict` wrote; it may come from anywhere.

    Raises:
        InputError: It is something else.
    """
    names = {"counts", "recent", "stop_ids", *RULE_NUMBERS}
    if not isinstance(plain, dict) or set(plain) != names:
        got = shown(sorted(map(str, plain))) if isinstance(plain, dict) else type(plain).__name__
        raise InputError(f"the state of a live session is {got}; expected an object with exactly {sorted(names)}.")
    numbers = {name: plain[name] for name in RULE_NUMBERS}
    # The same limits as for a session's settings.
    LiveSettings(**numbers)
    rules = CaptionRules(tuple(_ids("stop_ids", plain["stop_ids"], MAX_STOP_IDS)), **numbers)
    recent = _ids("recent", plain["recent"], rules.ngram_window)
    counts = plain["counts"]
    if not isinstance(counts, (list, tuple)) or len(counts) != 2:
        raise InputError("counts of a live session are no pair of lists (ids and their counts).")
    ids, amounts = _ids("counts", counts[0], MAX_COUNTS), counts[1]
    if not isinstance(amounts, (list, tuple)) or len(ids) != len(amounts) or not _are_amounts(amounts):
        raise InputError("counts of a live session must be as many numbers from 0 as ids.")
    return CaptionState(dict(zip(ids, map(float, amounts), strict=True)), tuple(recent)), rules


def _ids(name: str, values: Any, max_length: int) -> list[int]:
    # Types and bounds of all at once: a chunk brings 1,000 ids, and is checked where requests wait.
    is_list = isinstance(values, (list, tuple)) and set(map(type, values)) <= {int}
    if not is_list or (values and not 0 <= min(values) <= max(values) < 2**31):
        raise InputError(f"{name} of a live session is no list of token ids.")
    if len(values) > max_length:
        raise InputError(f"{name} of a live session has {len(values)} token ids; expected at most {max_length}.")
    return list(values)


def _are_amounts(values: Sequence[Any]) -> bool:
    types = set(map(type, values))
    # NaN is in no range.
    return all(issubclass(each, (int, float)) and each is not bool for each in types) and all(
        0 <= value < 1e9 for value in values
    )
