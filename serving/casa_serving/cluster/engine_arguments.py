"""Check of the argument names under `engine`, before a replica is started."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable

from casa_engine.errors import InputError


def check_engine_arguments(names: Iterable[str]) -> None:
    """Reject names that neither vLLM's engine nor its server has.

    Args:
        names: The keys under `engine` in the cluster configuration.

    Raises:
        InputError: Names the unknown arguments, and similar known ones.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import BaseFrontendArgs

    # Arguments of vLLM's server that affect responses, such as tool_call_parser; address and keys are the ingress's.
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
