"""An engine for live sessions without a server (`casa-caption`, benchmarks, tests)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casa_serving.engine_defaults import (
    embedded_checkpoint,
    engine_options,
    is_eager,
    logits_processors,
    read_checkpoint,
    runs_on_cpu,
    set_environment,
)

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


async def start_engine(checkpoint: Path, **options: Any) -> AsyncLLM:
    """Starts an engine in processes of its own, with the defaults of `casa-serve`.

    Args:
        checkpoint: Folder of the model.
        **options: vLLM's engine arguments that override the defaults.

    Returns:
        The engine; stop it with `shutdown()`.

    Raises:
        CheckpointError: The folder contains no CASA model.
    """
    checkpoint = Path(checkpoint)
    config, on_cpu = read_checkpoint(checkpoint), runs_on_cpu()
    embedded = checkpoint.resolve() == embedded_checkpoint().resolve()
    eager = options.get("enforce_eager", is_eager(embedded=embedded, on_cpu=on_cpu))
    set_environment(embedded=embedded, on_cpu=on_cpu, eager=eager, live=False)
    # Imported here because vLLM reads the environment at import.
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    defaults = engine_options(config, embedded=embedded, on_cpu=on_cpu)
    processors = logits_processors(options.pop("logits_processors", None), live=True, on_cpu=on_cpu)
    arguments = {name: value for name, value in defaults.items() if name in known}
    arguments |= {"model": str(checkpoint), "logits_processors": processors}
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**(arguments | options)))
