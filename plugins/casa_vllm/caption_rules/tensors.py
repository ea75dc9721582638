"""The tensors of the captioner's rules: one row a request, and pages of remembered tokens.

A session remembers 1,000 tokens of a vocabulary of 150,000, and may remember them all. Dense counts would be read and
written whole at every token (156 MB for 128 rows of float64, and none of it fits a CPU's cache); rows as wide as the
widest would let one session enlarge all others. So the tokens are kept in pages, as many as a row needs:

    page_table[row]   7 | 2 | 9 |          entry e of a row is ids[page_table[row, e // PAGE], e % PAGE]
    sizes[row]        NUM_IDS entries are in use

Counts are float64, as in the reference, and change by the same operations in the same order: they are equal to it.
"""

from dataclasses import dataclass

import torch

from casa_engine.live.caption_logits import MAX_STOP_IDS
from casa_engine.live.settings import INTEGER_RANGES

PAGE = 256
# Places for the last tokens of a row; a power of two that holds the longest window.
RING = 1 << (INTEGER_RANGES["ngram_window"][1] - 1).bit_length()
# Columns of `sizes`.
NUM_IDS, NUM_RECENT, NGRAM_SIZE, NGRAM_WINDOW, NUM_STOPS = range(5)
# Columns of `numbers`.
DECAY, LOG_PENALTY, CLAMP, STOP_BIAS = range(4)
# Of a row without rules: nothing in it changes a logit.
NEUTRAL_NUMBERS = (1.0, 0.0, 0.0, 1.0)
# Pages that the pool and a row's table begin with, for each row; both grow.
FIRST_PAGES = 8


@dataclass
class RuleTensors:
    """State and rules of S rows. Rows without rules have sizes 0 and `NEUTRAL_NUMBERS`.

    Attributes:
        ids: (pages, PAGE) int32, remembered tokens, no stop tokens; -1 beyond the last of a row.
        counts: (pages, PAGE) float64, their decayed counts; 0 where a token is forgotten.
        page_table: (S, P) int32, pages of a row; entries beyond those in use may be anything.
        sizes: (S, 5) int32: remembered tokens, tokens read into the ring, n, window, stop ids.
        numbers: (S, 4) float64: decay, logarithm of the penalty (0 is off), clamp, stop bias (1 is off).
        recent: (S, RING) int32, token i of the row's text at i % RING; not kept where n is 0.
        stop_ids: (S, MAX_STOP_IDS) int32, each once; -1 beyond the last.
    """

    ids: torch.Tensor
    counts: torch.Tensor
    page_table: torch.Tensor
    sizes: torch.Tensor
    numbers: torch.Tensor
    recent: torch.Tensor
    stop_ids: torch.Tensor

    @classmethod
    def neutral(cls, num_rows: int, device: torch.device) -> "RuleTensors":
        """Return rows without rules."""
        num_pages = num_rows * FIRST_PAGES
        int32 = {"dtype": torch.int32, "device": device}
        numbers = torch.tensor(NEUTRAL_NUMBERS, dtype=torch.float64).repeat(num_rows, 1)
        return cls(
            ids=torch.full((num_pages, PAGE), -1, **int32),
            counts=torch.zeros(num_pages, PAGE, dtype=torch.float64, device=device),
            page_table=torch.zeros(num_rows, FIRST_PAGES, **int32),
            sizes=torch.zeros(num_rows, NUM_STOPS + 1, **int32),
            numbers=numbers.to(device),
            recent=torch.zeros(num_rows, RING, **int32),
            stop_ids=torch.full((num_rows, MAX_STOP_IDS), -1, **int32),
        )

    def reserve(self, num_pages: int, num_columns: int) -> None:
        """Grow the pool and the page tables to hold at least so many; both at least double. Contents are kept."""
        if num_pages > len(self.ids):
            more = max(num_pages, 2 * len(self.ids)) - len(self.ids)
            self.ids = torch.cat((self.ids, self.ids.new_full((more, PAGE), -1)))
            self.counts = torch.cat((self.counts, self.counts.new_zeros(more, PAGE)))
        if num_columns > self.page_table.shape[1]:
            more = max(num_columns, 2 * self.page_table.shape[1]) - self.page_table.shape[1]
            self.page_table = torch.cat((self.page_table, self.page_table.new_zeros(len(self.page_table), more)), 1)
