"""The captioner's rules on Model Runner V2 (GPUs), whose sampler supports no logits processors.

The model state may wrap the sampler (`custom_sampler`). A session's row is created from the chunk that was sent; the
tokens generated since are read from the step's own input: the token that a decode step computes is the one that was
sampled last. That is one copy from the device in each step that has such rows; other steps cost nothing.
"""

import logging
from typing import TYPE_CHECKING, Any

import torch

from casa_engine.errors import InputError
from casa_vllm.caption_processor import CaptionRow, new_row

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
        self._rows: dict[str, tuple[CaptionRow, list[int]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __call__(self, logits: torch.Tensor, input_batch: "InputBatch") -> Any:
        """Samples; logits are (B, V)."""
        return self._sampler(self.apply_rules(logits, input_batch), input_batch)

    def add_row(self, data: "NewRequestData") -> None:
        """Adds the row of a new or resumed request, or of a session's next chunk."""
        # In a resumed request the prompt is followed by the tokens that it had generated.
        output_ids = list((data.prefill_token_ids or ())[data.prompt_len :])
        try:
            row = new_row(data.sampling_params, output_ids)
        except InputError as error:
            # V2 does not validate extra arguments, and must not crash on them. casa-serve rejects those of a client;
            # for a program that calls the engine they are logged.
            logger.warning("Request %s brings no state of a live session: %s", data.req_id, error)
            row = None
        if row is None:
            self._rows.pop(data.req_id, None)
        else:
            self._rows[data.req_id] = (row, output_ids)

    def remove_row(self, request_id: str) -> None:
        """Removes the row of a request that has left the batch."""
        self._rows.pop(request_id, None)

    def apply_rules(self, logits: torch.Tensor, input_batch: "InputBatch") -> torch.Tensor:
        """Returns logits (B, V): a float32 copy if the batch has a session's row, otherwise the same tensor."""
        rows = [index for index, request_id in enumerate(input_batch.req_ids) if request_id in self._rows]
        if not rows:
            return logits
        last_ids = input_batch.input_ids[input_batch.logits_indices].tolist()
        logits = logits.to(torch.float32, copy=True)
        for index in rows:
            row, output_ids = self._rows[input_batch.req_ids[index]]
            # The prompt is computed: this step computes the token sampled last.
            if input_batch.num_computed_tokens_np[index] >= input_batch.prefill_len_np[index]:
                output_ids.append(last_ids[index])
            logits[index] = row.apply(logits[index])
        return logits
