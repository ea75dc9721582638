"""The captioner's rules on Model Runner V2 (GPUs), whose sampler takes no logits processors.

The model state may wrap the sampler (`custom_sampler`). A session's row is known here from the chunk that was sent;
what has been generated since is read from the step's own input: the token that a decode step computes is the one that
was sampled last. That is one copy from the device in each step that has such rows; other steps pay nothing.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from casa_engine.errors import InputError
from casa_vllm.caption_processor import CaptionRow, new_row

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch

logger = init_logger(__name__)


class CaptionSampler:
    """vLLM's sampler, with logits changed for the rows of live sessions.

    Args:
        sampler: vLLM's own, which does everything else.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self._rows: dict[str, tuple[CaptionRow, list[int]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __call__(self, logits: torch.Tensor, input_batch: "InputBatch") -> Any:
        """Samples; logits are (B, V)."""
        return self._sampler(self.change(logits, input_batch), input_batch)

    def chunk_sent(self, data: "NewRequestData") -> None:
        """A request is new, resumed, or a session's next chunk."""
        # Of a resumed request the prompt is followed by what it had generated.
        output_ids = list((data.prefill_token_ids or ())[data.prompt_len :])
        try:
            row = new_row(data.sampling_params, output_ids)
        except InputError as error:
            # V2 asks nobody whether extra arguments are in order, and must not fall over them. casa-serve refuses
            # those of a client; a program that calls the engine reads of it in the log.
            logger.warning("Request %s brings no state of a live session: %s", data.req_id, error)
            row = None
        if row is None:
            self._rows.pop(data.req_id, None)
        else:
            self._rows[data.req_id] = (row, output_ids)

    def forget(self, request_id: str) -> None:
        """The request has left the batch."""
        self._rows.pop(request_id, None)

    def change(self, logits: torch.Tensor, input_batch: "InputBatch") -> torch.Tensor:
        """The logits (B, V), float32 and new where the batch holds a session's row."""
        rows = [index for index, request_id in enumerate(input_batch.req_ids) if request_id in self._rows]
        if not rows:
            return logits
        last_ids = input_batch.input_ids[input_batch.logits_indices].tolist()
        logits = logits.to(torch.float32, copy=True)
        for index in rows:
            row, output_ids = self._rows[input_batch.req_ids[index]]
            # What was sent has been computed: this step computes the token sampled last.
            if input_batch.num_computed_tokens_np[index] >= input_batch.prefill_len_np[index]:
                output_ids.append(last_ids[index])
            logits[index] = row.apply(logits[index])
        return logits
