"""The captioner's rules in NumPy, all rows of a batch at once: for CPUs.

Equal to `casa_engine.live.caption_logits`: counts are the same float64 numbers, each operation on a logit is the same
float32 operation. The one difference that is possible is in the exponential: NumPy's and the C library's float64
results may differ in their last bit, which their float32 shows once in some 10^8 tokens.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch

from casa_engine.live.caption_logits import MAX_LOG_PENALTY, MIN_COUNT
from casa_vllm.caption_rules.tensors import (
    CLAMP,
    DECAY,
    LOG_PENALTY,
    NGRAM_SIZE,
    NGRAM_WINDOW,
    NUM_IDS,
    NUM_RECENT,
    NUM_STOPS,
    PAGE,
    RING,
    STOP_BIAS,
    RuleTensors,
)


def numpy_apply_rules(logits: torch.Tensor, rows: torch.Tensor, new_ids: torch.Tensor, tensors: RuleTensors) -> None:
    """See `CaptionTable.apply`; logits are float32, and everything is on the CPU."""
    num_rows, width = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    stride = logits.stride(0)
    table = SimpleNamespace(**{name: tensor.numpy() for name, tensor in vars(tensors).items()})
    flat = logits.as_strided(((num_rows - 1) * stride + width,), (1,)).numpy()
    rows = rows.numpy().astype(np.int64)
    batch = np.flatnonzero(rows >= 0)
    step = _Step(flat, width, table, batch * stride, rows[batch], new_ids.numpy()[batch].astype(np.int32))
    # Logits are whatever a model makes; torch does not warn of infinities either.
    with np.errstate(all="ignore"):
        _penalise(step.where(table.numbers[step.rows, LOG_PENALTY] != 0))
        _bias_stops(step.where(table.numbers[step.rows, STOP_BIAS] != 1))
        _ban_ngrams(step.where(table.sizes[step.rows, NGRAM_SIZE] > 0))


@dataclass
class _Step:
    """R rows of a step that one rule concerns.

    Attributes:
        logits: All rows of the batch as one vector, float32.
        width: V, logits of a row.
        table: `RuleTensors`, as arrays on the same memory.
        starts: (R,) int64, where the logits of each row begin.
        rows: (R,) int64, their rows in the table.
        new_ids: (R,) int32, -1 for none.
    """

    logits: np.ndarray
    width: int
    table: SimpleNamespace
    starts: np.ndarray
    rows: np.ndarray
    new_ids: np.ndarray

    def where(self, chosen: np.ndarray) -> "_Step":
        """Return the rows for which `chosen`, (R,) bool, is true."""
        if chosen.all():
            return self
        return replace(self, starts=self.starts[chosen], rows=self.rows[chosen], new_ids=self.new_ids[chosen])

    @property
    def stop_ids(self) -> np.ndarray:
        """(R, most stop ids of a row) int32, -1 beyond the last."""
        width = self.table.sizes[self.rows, NUM_STOPS].max(initial=0)
        return self.table.stop_ids[self.rows, :width]

    def has_logit(self, ids: np.ndarray) -> np.ndarray:
        """Return whether ids, int32, are of a row's logits; -1 is not."""
        return ids.view(np.uint32) < self.width


def _penalise(step: _Step) -> None:
    """Count the new tokens and apply the repetition penalty."""
    table, rows, new_ids = step.table, step.rows, step.new_ids
    if not len(rows):
        return
    is_new = new_ids >= 0
    is_counted = is_new & ~(step.stop_ids == new_ids[:, None]).any(1)
    num_ids = table.sizes[rows, NUM_IDS]
    # (N,) pages of the rows, one after the other, and whose they are.
    num_pages = -(-num_ids // PAGE)
    owners = np.repeat(np.arange(len(rows)), num_pages)
    columns = np.arange(len(owners)) - (num_pages.cumsum() - num_pages)[owners]
    pages = table.page_table[rows[owners], columns]
    ids, counts = table.ids.take(pages, 0), table.counts.take(pages, 0)
    numbers = table.numbers[rows]
    strengths, clamps = numbers[:, LOG_PENALTY], numbers[:, CLAMP]

    counts *= np.where(is_new, numbers[:, DECAY], 1.0)[owners, None]
    counts[counts <= MIN_COUNT] = 0
    # No id is -2.
    said = (ids == np.where(is_counted, new_ids, np.int32(-2))[owners, None]).nonzero()
    counts[said] += 1
    table.counts[pages] = counts

    factors = _factors(counts, strengths[owners, None], clamps[owners, None])
    entries = np.flatnonzero(step.has_logit(ids))
    places = step.starts[owners, None] + ids
    _scale(step.logits, places.ravel().take(entries), factors.ravel().take(entries))

    is_first = is_counted.copy()
    is_first[owners[said[0]]] = False
    first = np.flatnonzero(is_first)
    if len(first):
        _remember(step, first, num_ids[first])
        first = first[step.has_logit(new_ids[first])]
        _scale(step.logits, step.starts[first] + new_ids[first], _factors(1.0, strengths[first], clamps[first]))


def _factors(counts: np.ndarray | float, strengths: np.ndarray, clamps: np.ndarray) -> np.ndarray:
    """Return what logits are multiplied or divided by, float32, of float64 counts."""
    penalties = np.minimum(counts, clamps)
    penalties *= strengths
    np.clip(penalties, -MAX_LOG_PENALTY, MAX_LOG_PENALTY, out=penalties)
    return np.exp(penalties, out=penalties).astype(np.float32)


def _scale(logits: np.ndarray, places: np.ndarray, factors: np.ndarray) -> None:
    """Multiply negative logits, divide others."""
    chosen = logits.take(places)
    logits[places] = np.where(chosen < 0, chosen * factors, chosen / factors)


def _remember(step: _Step, first: np.ndarray, num_ids: np.ndarray) -> None:
    """Add the new tokens of rows `first`, which have `num_ids` already, to their pages."""
    table, rows = step.table, step.rows[first]
    pages, places = table.page_table[rows, num_ids // PAGE], num_ids % PAGE
    table.ids[pages, places] = step.new_ids[first]
    table.counts[pages, places] = 1.0
    table.sizes[rows, NUM_IDS] += 1


def _bias_stops(step: _Step) -> None:
    """Apply the bias to the logits of stop tokens."""
    stop_ids = step.stop_ids
    owners, columns = step.has_logit(stop_ids).nonzero()
    places = step.starts[owners] + stop_ids[owners, columns]
    biases, chosen = step.table.numbers[step.rows[owners], STOP_BIAS].astype(np.float32), step.logits[places]
    step.logits[places] = np.where(chosen < 0, chosen / biases, chosen * biases)


def _ban_ngrams(step: _Step) -> None:
    """Read the new tokens and ban those that would complete an n-gram of the window a second time."""
    table, rows, new_ids = step.table, step.rows, step.new_ids
    if not len(rows):
        return
    num_recent, is_new = table.sizes[rows, NUM_RECENT], new_ids >= 0
    table.recent[rows[is_new], num_recent[is_new] % RING] = new_ids[is_new]
    num_recent += is_new
    table.sizes[rows, NUM_RECENT] = num_recent
    sizes = table.sizes[rows, NGRAM_SIZE]
    lengths = np.minimum(num_recent, table.sizes[rows, NGRAM_WINDOW])
    width = lengths.max()
    # (R, width): the last tokens, the newest in the last column; a shorter window begins later.
    columns = np.arange(width)
    recent = table.recent[rows[:, None], (num_recent[:, None] - width + columns) % RING]
    has_room = columns >= (width - lengths + sizes - 1)[:, None]
    # Where an n-gram may end: few places are left after the token before the last has been compared.
    follows_last = np.zeros_like(has_room)
    follows_last[:, 1:] = recent[:, :-1] == recent[:, -1:]
    owners, ends = (has_room & (follows_last | (sizes == 1)[:, None])).nonzero()
    for distance in range(2, sizes.max()):
        if not len(owners):
            return
        # Beyond n tokens nothing is compared; where that would be before the window, any place does.
        before, last = np.maximum(ends - distance, 0), max(width - distance, 0)
        is_same = (recent[owners, before] == recent[owners, last]) | (distance >= sizes[owners])
        owners, ends = owners[is_same], ends[is_same]
    banned = recent[owners, ends]
    is_banned = step.has_logit(banned) & ~(step.stop_ids[owners] == banned[:, None]).any(1)
    step.logits[step.starts[owners[is_banned]] + banned[is_banned]] = -np.inf
