"""The captioner's rules (`casa_engine.live.caption_logits`) in vLLM's V1 sampler.

A session sends its state with every chunk, as `SamplingParams.extra_args["casa_live"]`, up to the chunk's last
token. The tokens generated since are added here, from vLLM's own list of ids: a row is a function of these two alone,
so that preemption and resumption change nothing, and the engine keeps no state when the chunk ends.

Selected by `--logits-processors casa_vllm.caption_processor:CaptionLogitsProcessor` and not by an entry point: any
installed entry point would disable Model Runner V2, for every model.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from casa_engine.live.caption_logits import EXTRA_ARG, CaptionRules, CaptionState, caption_logits, from_dict

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class CaptionRow:
    """One request's state, updated with the tokens that it has generated.

    Args:
        state: Sent with the chunk.
        rules: The same.
        output_ids: Ids that the chunk has generated; vLLM appends to this list.
    """

    def __init__(self, state: CaptionState, rules: CaptionRules, output_ids: Sequence[int]) -> None:
        self._state, self._rules, self._output_ids = state.decay_counts(rules), rules, output_ids
        self._num_read = 0

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns logits, float32 (V,), for the next token. Idempotent for the same token."""
        for token in self._output_ids[self._num_read :]:
            # vLLM appends a placeholder while a step is running, and replaces it before the next sampling.
            assert token >= 0, "a token was not filled in before sampling"
            self._state = self._state.read([token], self._rules).decay_counts(self._rules)
            self._num_read += 1
        return caption_logits(logits, self._state, self._rules)


def new_row(params: SamplingParams | None, output_ids: Sequence[int]) -> CaptionRow | None:
    """Returns the row of a request; None unless it belongs to a live session with rules."""
    plain = None if params is None else (params.extra_args or {}).get(EXTRA_ARG)
    return None if plain is None else CaptionRow(*from_dict(plain), output_ids)


class CaptionLogitsProcessor(LogitsProcessor):
    """Applies the rules to the rows of live sessions; leaves others unchanged."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Rejects a client's value in place of a session's state.

        Raises:
            InputError: A ValueError, for which vLLM returns 400.
        """
        plain = (sampling_params.extra_args or {}).get(EXTRA_ARG)
        if plain is not None:
            from_dict(plain)

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, CaptionRow] = {}

    def is_argmax_invariant(self) -> bool:
        """Returns False: greedy sampling changes as well."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Hook called by vLLM: adds, moves and removes rows with the batch."""
        process_dict_updates(self._rows, batch_update, self._new_row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Changes the rows of sessions in place; logits are float32 (B, V)."""
        for index, row in self._rows.items():
            logits[index] = row.apply(logits[index])
        return logits

    @staticmethod
    def _new_row(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> CaptionRow | None:
        return new_row(params, output_ids)
