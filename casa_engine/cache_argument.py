"""The name under which transformers passes a cache: `past_key_values` up to 5.23, `cache` from 5.24 on.

The only place that depends on it. CASA's own calls accept both names on every version; what is passed to transformers
or comes from it (arguments of generation's hooks, fields of outputs) is named `CACHE_ARGUMENT`.
"""

from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from casa_engine.errors import InputError
from casa_engine.image_inputs import VIRTUAL_TOKENS

NAMES = ("cache", "past_key_values")
CACHE_ARGUMENT = next(name for name in NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})


def pop_cache(arguments: dict[str, Any]) -> Cache | None:
    """Remove the cache from keyword arguments under either name and return it.

    Args:
        arguments: Keyword arguments of a call. Mutated.

    Returns:
        The cache, or None.

    Raises:
        InputError: Both names hold a cache.
    """
    given = [value for name in NAMES if (value := arguments.pop(name, None)) is not None]
    if len(given) > 1:
        raise InputError(
            "got both cache and past_key_values; they are two names of one argument: pass one of them. The second one "
            f"may be PEFT's: {VIRTUAL_TOKENS}."
        )
    return given[0] if given else None


def output_with_cache(
    logits: Tensor, cache: Any, loss: Tensor | None = None, hidden_states: tuple[Tensor, ...] | None = None
) -> CausalLMOutputWithPast:
    """Build transformers' output class: logits (B, T, V), the cache, the loss, a scalar, hidden states (B, T, C)."""
    return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=hidden_states, **{CACHE_ARGUMENT: cache})
