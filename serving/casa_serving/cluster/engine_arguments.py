"""Whether `engine` names arguments that vLLM has, before a replica is started to find out."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable

from casa_engine.errors import InputError


def check_engine_arguments(names: Iterable[str]) -> None:
    """Refuses names that neither vLLM's engine nor its server takes.

    Args:
        names: The keys under `engine` in the cluster configuration.

    Raises:
        InputError: Which names are unknown, and what they may have been meant to be.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import BaseFrontendArgs

    # Those of vLLM's server that shape answers, such as tool_call_parser; the ingress has the address and the keys.
    known = [field.name for kind in (AsyncEngineArgs, BaseFrontendArgs) for field in dataclasses.fields(kind)]
    unknown = sorted(set(names) - set(known))
    if not unknown:
        return
    close = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
    hints = [f"{name!r} (did you mean {match[0]!r}?)" if match else repr(name) for name, match in close.items()]
    raise InputError(
        f"The cluster configuration is wrong: engine sets {', '.join(hints)}, which vLLM's engine does not "
        "take. Use the names of its arguments with underscores, such as max_model_len."
    )
