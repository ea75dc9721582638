"""Whether `engine` names arguments that vLLM's engine has, before a replica is started to find out."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable

from casa_engine.errors import InputError


def check_engine_arguments(names: Iterable[str]) -> None:
    """Refuses names that vLLM's engine does not take.

    Args:
        names: The keys under `engine` in the cluster configuration.

    Raises:
        InputError: Which names are unknown, and what they may have been meant to be.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
    unknown = sorted(set(names) - set(known))
    if not unknown:
        return
    close = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
    hints = [f"{name!r} (did you mean {match[0]!r}?)" if match else repr(name) for name, match in close.items()]
    raise InputError(
        f"The cluster configuration is wrong: engine sets {', '.join(hints)}, which vLLM's engine does not "
        "take. Use the names of its arguments with underscores, such as max_model_len."
    )
