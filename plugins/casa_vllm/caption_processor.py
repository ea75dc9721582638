"""The captioner's rules (`casa_vllm.caption_rules`) in vLLM's V1 sampler.

A session sends its state with every chunk, as `SamplingParams.extra_args["casa_live"]`, up to the chunk's last
token. The tokens generated since are added here, from vLLM's own list of ids: a row is a function of these two alone,
so that preemption and resumption change nothing, and the engine keeps no state when the chunk ends.

Selected by `--logits-processors casa_vllm.caption_processor:CaptionLogitsProcessor` and not by an entry point: any
installed entry point would disable Model Runner V2, for every model.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm import SamplingParams
from vllm.triton_utils import HAS_TRITON
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from casa_engine.live.caption_logits import EXTRA_ARG, CaptionRules, CaptionState, from_dict
from casa_vllm.caption_rules import CaptionTable
from casa_vllm.caption_rules.remembered import RememberedRow
from casa_vllm.caption_rules.staging import copy_together

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def sent_state(params: SamplingParams | None) -> tuple[CaptionState, CaptionRules] | None:
    """Return what a chunk has brought; None unless it belongs to a live session with rules.

    Raises:
        InputError: It is no state of a live session.
    """
    plain = None if params is None else (params.extra_args or {}).get(EXTRA_ARG)
    if plain is None:
        return None
    state, rules = from_dict(plain)
    return None if rules.is_neutral else (state, rules)


class CaptionRow:
    """One request of a batch.

    Args:
        state: Sent with the chunk.
        rules: The same.
        output_ids: Ids that the chunk has generated; vLLM appends to this list.
    """

    def __init__(self, state: CaptionState, rules: CaptionRules, output_ids: Sequence[int]) -> None:
        self._state, self._rules, self._output_ids = state, rules, output_ids
        self._num_read: int | None = None
        # In the table; None before the row is written.
        self.table_row: int | None = None

    def read(self, table: CaptionTable) -> int:
        """Return the token sampled last, for the device to count; -1 if there is none that was not read.

        Writes the row where the device cannot follow: a new row, which may have generated before (a resumed request).
        """
        num_read, self._num_read = self._num_read, len(self._output_ids)
        if num_read == self._num_read:
            return -1
        # vLLM appends a placeholder while a step is running, and replaces it before the next sampling.
        assert self._output_ids[-1:] != [-1], "a token was not filled in before sampling"
        if num_read is not None and self._num_read == num_read + 1:
            return self._output_ids[-1]
        table.write(self.table_row, RememberedRow.of_chunk(self._state, self._rules, self._output_ids))
        return -1


class CaptionLogitsProcessor(LogitsProcessor):
    """Applies the rules to the rows of live sessions; leaves others unchanged."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Reject a client's value in place of a session's state.

        Raises:
            InputError: A ValueError, for which vLLM returns 400.
        """
        sent_state(sampling_params)

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        num_rows = vllm_config.scheduler_config.max_num_seqs
        self._device = device
        self._table = CaptionTable(num_rows, device, use_triton=HAS_TRITON)
        self._free_rows = list(range(num_rows))[::-1]
        self._rows: dict[int, CaptionRow] = {}

    def is_argmax_invariant(self) -> bool:
        """Return False: greedy sampling changes as well."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Hook called by vLLM: adds, moves and removes rows with the batch."""
        before = list(self._rows.values())
        if not process_dict_updates(self._rows, batch_update, self._new_row):
            return
        # vLLM moves rows in the batch; in the table each keeps its place.
        kept = set(self._rows.values())
        for row in before:
            if row not in kept and row.table_row is not None:
                self._table.clear(row.table_row)
                self._free_rows.append(row.table_row)
        for row in kept:
            if row.table_row is None:
                row.table_row = self._free_rows.pop()

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Change the rows of sessions in place; logits are float32 (B, V)."""
        if not self._rows:
            return logits
        host_rows, new_ids = np.full((2, len(logits)), -1, np.int64)
        for index, row in self._rows.items():
            new_ids[index] = row.read(self._table)
            host_rows[index] = row.table_row
        rows, new_ids = copy_together((host_rows, new_ids), self._device)
        self._table.apply(logits, rows, new_ids, host_rows)
        return logits

    @staticmethod
    def _new_row(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> CaptionRow | None:
        sent = sent_state(params)
        return None if sent is None else CaptionRow(*sent, output_ids)
