"""An engine for live sessions without a server (`casa-caption`, benchmarks, tests)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from casa_engine.originals.views import resolve_checkpoint
from casa_serving.engine_defaults import (
    embedded_checkpoint,
    engine_arguments,
    read_checkpoint,
    runs_on_cpu,
    set_environment,
)

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


async def start_engine(checkpoint: Path, **options: Any) -> AsyncLLM:
    """Start an engine in processes of its own, with the defaults of `casa-serve`.

    Args:
        checkpoint: Folder of the model.
        **options: vLLM's engine arguments that override the defaults.

    Returns:
        The engine; stop it with `shutdown()`.

    Raises:
        CheckpointError: The folder contains no CASA model.
    """
    checkpoint = resolve_checkpoint(checkpoint)
    arguments, variables = engine_arguments(
        read_checkpoint(checkpoint),
        embedded=checkpoint.resolve() == embedded_checkpoint().resolve(),
        on_cpu=runs_on_cpu(),
        live=True,
        given=options,
    )
    # No server's endpoint for sessions: they are opened in this process.
    set_environment(variables, live=False)
    # Imported here: the protocol and its client need no vLLM.
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    # vLLM chooses a step's tokens by it, and with them the images of a step: a server's, not those of a program.
    context = UsageContext.OPENAI_API_SERVER
    return AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(checkpoint), **arguments), usage_context=context)
