"""The captioner's rules on Model Runner V2 (GPUs), whose sampler supports no logits processors.

The model state may wrap the sampler (`custom_sampler`). A session's row is written from the chunk that was sent, into
the place of the table that the runner has given the request. The tokens generated since are read on the device, from
the step's own input: the token that a decode step computes is the one that was sampled last. The host learns none.
"""

import logging
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.triton_utils import HAS_TRITON

from casa_engine.errors import InputError
from casa_vllm.caption_processor import sent_state
from casa_vllm.caption_rules import CaptionTable
from casa_vllm.caption_rules.remembered import RememberedRow
from casa_vllm.kernel_warmup import warm_up_sampling

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch

logger = logging.getLogger("vllm.casa_captions")


class CaptionSampler:
    """vLLM's sampler, with the rules applied to the rows of live sessions.

    Args:
        sampler: vLLM's own.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self._states = sampler.req_states
        self._rows: dict[str, int] = {}
        self._is_profiled = False

    @cached_property
    def _table(self) -> CaptionTable:
        # Not made with the sampler: sleep mode discards what is allocated while weights are loaded.
        return CaptionTable(self._states.max_num_reqs, self._states.device, use_triton=HAS_TRITON)

    def warm_up(self) -> None:
        """Compile the kernels, with nobody's row, and those that sample: not in the first session's request."""
        device = self._states.device
        nobody = torch.full((1,), -1, device=device)
        self._table.apply(torch.zeros(1, 2, device=device), nobody, nobody.int(), np.array([-1]))
        warm_up_sampling(self._states.vocab_size, device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __call__(self, logits: torch.Tensor, input_batch: "InputBatch") -> Any:
        """Sample; logits are (B, V).

        The first call is vLLM's memory profiling, which has to count the copy that sessions will cause, and compiles
        the sampler's kernels: for that copy's type and for the model's own, which requests without rules sample from.
        """
        if not self._is_profiled:
            self._is_profiled = True
            self._sampler(logits.to(torch.float32, copy=True), input_batch)
        return self._sampler(self.apply_rules(logits, input_batch), input_batch)

    def add_row(self, row: int, data: "NewRequestData") -> None:
        """Add a new or resumed request, or a session's next chunk, in the row that the runner has given it."""
        self.remove_row(data.req_id)
        try:
            sent = sent_state(data.sampling_params)
        except InputError as error:
            # V2 does not validate extra arguments, and must not crash on them. casa-serve rejects those of a client;
            # for a program that calls the engine they are logged.
            logger.warning("Request %s brings no state of a live session: %s", data.req_id, error)
            return
        if sent is not None:
            # In a resumed request the prompt is followed by the tokens that it had generated.
            output_ids = (data.prefill_token_ids or ())[data.prompt_len :]
            self._table.write(row, RememberedRow.of_chunk(*sent, output_ids))
            self._rows[data.req_id] = row

    def remove_row(self, request_id: str) -> None:
        """Remove the row of a request that has left the batch."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            self._table.clear(row)

    def apply_rules(self, logits: torch.Tensor, input_batch: "InputBatch") -> torch.Tensor:
        """Return logits (B, V): a float32 copy if the batch has a session's row, otherwise the same tensor."""
        if not self._table.has_rules(input_batch.idx_mapping_np):
            return logits
        rows = input_batch.idx_mapping.long()
        # Past the prompt the step computes the token sampled last; before, none was sampled.
        is_past_prompt = input_batch.seq_lens[: len(rows)] > self._states.prefill_len.gpu[rows]
        computed = input_batch.input_ids[input_batch.logits_indices]
        logits = logits.to(torch.float32, copy=True)
        self._table.apply(logits, rows, torch.where(is_past_prompt, computed, -1), input_batch.idx_mapping_np)
        return logits
