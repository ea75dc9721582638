"""Arguments of a forward call beside its inputs: those that transformers' models share.

What an argument asks for is done, or it is refused: none is taken and forgotten.
"""

from typing import Any

import torch
from torch import Tensor

from casa_engine.call_inputs import CallInputs
from casa_engine.configuration import CasaConfig
from casa_engine.errors import InputError
from casa_engine.tensor_checks import check_tensor

# Keyword arguments of `transformers.utils.TransformersKwargs` that ask for nothing where they have one of these values.
PACKED = "texts that are packed into one row see each other here; pad them instead, each in a row of its own"
NEUTRAL = {
    "output_attentions": ((None, False), "attention weights are never computed here; leave it out"),
    "output_router_logits": ((None, False), "the model has no experts; leave it out"),
    "is_causal": ((None, True), "text is always causal; leave it out"),
    "cu_seq_lens_q": ((None,), PACKED),
    "cu_seq_lens_k": ((None,), PACKED),
    "max_length_q": ((None,), PACKED),
    "max_length_k": ((None,), PACKED),
    "seq_idx": ((None,), PACKED),
}
USED = "num_items_in_batch"


def check_options(options: dict[str, Any]) -> None:
    """Raise InputError for a keyword argument that is unknown, or asks for what the model does not do."""
    for name, value in options.items():
        if name == USED:
            continue
        if name not in NEUTRAL:
            raise InputError(f"got {name}, which is no argument of the model; expected those of its forward.")
        neutral, why = NEUTRAL[name]
        if not any(value is each for each in neutral):
            raise InputError(f"got {name}: {why}.")


def check_labels(labels: Tensor, text: Tensor | None, config: CasaConfig, logits_to_keep: int) -> None:
    """Check labels against the text that they belong to.

    Args:
        labels: int64 (B, T), ids or -100.
        text: Ids (B, T) or embeddings (B, T, C).
        config: The model's configuration.
        logits_to_keep: Must be 0: each label but the first has logits.

    Raises:
        InputError: They are anything else.
    """
    if not isinstance(text, Tensor):
        return  # the check of the inputs says it
    check_tensor("labels", labels, "int", tuple(text.shape[:2]), text.device)
    vocab_size = config.text_config.vocab_size
    wrong = labels[(labels != -100) & ((labels < 0) | (labels >= vocab_size))]
    if len(wrong):
        raise InputError(f"labels have {int(wrong[0])}; expected ids from 0 to {vocab_size - 1}, or -100 to leave out.")
    if logits_to_keep:
        raise InputError(f"logits_to_keep is {logits_to_keep} with labels, which need all logits; leave it out.")


def check_logits_to_keep(logits_to_keep: int) -> None:
    """Raise InputError unless it is a whole number from 0."""
    if not isinstance(logits_to_keep, int) or isinstance(logits_to_keep, bool) or logits_to_keep < 0:
        raise InputError(f"logits_to_keep is {logits_to_keep!r}; expected how many last positions, 0 for all.")


def check_position_ids(position_ids: Tensor, inputs: CallInputs) -> None:
    """Raise InputError unless the positions of real tokens, int (B, T) or (1, T), are those that the mask gives."""
    num_rows, num_columns = inputs.real.shape
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2 and len(position_ids) == 1:
        position_ids = position_ids.expand(num_rows, -1)
    check_tensor("position_ids", position_ids, "int", (num_rows, num_columns), inputs.positions.device)
    if not torch.equal(position_ids[inputs.real].long(), inputs.positions[inputs.real]):
        raise InputError(
            "position_ids say otherwise than attention_mask, from which positions follow: each row is one text from 0 "
            f"on; leave them out, or, where several texts are packed into a row: {PACKED}."
        )
