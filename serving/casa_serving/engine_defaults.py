"""The arguments and the environment of a CASA engine, for `casa-serve`, a cluster's replicas and `casa-caption`.

Every value here is a default of vLLM's own option or variable of that name, so that naming
it on the command line, or setting it in the environment, wins.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any

from casa_engine.checkpoints import check_tensors, read_config
from casa_engine.configuration import CasaConfig
from casa_engine.errors import CheckpointError, ConfigError
from casa_serving.engine_environment import CONNECTOR, environment
from casa_vllm.api import CAPTION_PROCESSOR

EMBEDDED_NAME = "casa-tiny-digits"
# A conversation's old images cost a CASA model nothing but their encoding, so the count is
# bounded by what one request may reasonably carry, not by the context.
MAX_IMAGES = 256
# Threads that render requests, where there are four times as many cores: each has a tokenizer of its own, and images
# are decoded by four threads at most (see docs/limits.md).
MAX_RENDERERS = 4
HTTP_PLUGIN = "casa_http"
LIVE_PLUGIN = "casa_live"
# From the signal to the exit: below the 10 s after which `docker stop` kills.
SHUTDOWN_TIMEOUT_S = 8
# Groups whose plugins vLLM loads by default; endpoint plugins must be named.
PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
# Arguments of vLLM's server, beside those of its engine. CORS: no other origin is allowed unless the operator names it.
# Details: usage says how many tokens of a prompt were found in the cache.
SERVER_ARGUMENTS: Mapping[str, Any] = MappingProxyType({"allowed_origins": [], "enable_prompt_tokens_details": True})
# The embedded model calls tools as Hermes' models do, whenever it is offered one: with `tool_choice` "none" they are
# therefore not shown to it.
EMBEDDED_SERVER_ARGUMENTS: Mapping[str, Any] = MappingProxyType(
    {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "exclude_tools_when_tool_choice_none": True}
)

# A frame's encoder is some 900 launches otherwise.
ENCODER_GRAPHS: Mapping[str, Any] = MappingProxyType({"cudagraph_mm_encoder": True})


def server_arguments(*, embedded: bool) -> dict[str, Any]:
    """Return the arguments of vLLM's server where the user sets none; `embedded` as for `engine_arguments`."""
    return {**SERVER_ARGUMENTS, **(EMBEDDED_SERVER_ARGUMENTS if embedded else {})}


def engine_arguments(
    config: CasaConfig,
    *,
    embedded: bool,
    on_cpu: bool,
    live: bool = False,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the arguments of a CASA engine by vLLM's names, and the environment variables that belong to them.

    The caller adds the checkpoint's folder, which each of vLLM's interfaces takes in another way.

    Args:
        config: The checkpoint's configuration.
        embedded: Whether it is the model in the package, which is known to be tiny.
        on_cpu: Whether vLLM will run on the CPU.
        live: Whether there are live sessions.
        given: Arguments that are set already; they override the defaults.
    """
    arguments = {**default_arguments(config, embedded=embedded, on_cpu=on_cpu), **given}
    if arguments.get("language_model_only") and arguments.get("compilation_config") == ENCODER_GRAPHS:
        arguments["compilation_config"] = {}  # vLLM refuses graphs of an encoder that is not there
    if live and on_cpu:
        # On GPUs Model Runner V2 supports no logits processors; there the plugin wraps the sampler.
        arguments["logits_processors"] = [*(arguments.get("logits_processors") or ()), CAPTION_PROCESSOR]
    eager = arguments.get("enforce_eager", False)
    return arguments, environment(embedded=embedded, on_cpu=on_cpu, eager=eager)


def default_arguments(config: CasaConfig, *, embedded: bool, on_cpu: bool) -> dict[str, Any]:
    """Return the engine's arguments where the user sets none; see `engine_arguments`."""
    from vllm.config import StructuredOutputsConfig

    arguments: dict[str, Any] = {
        "max_model_len": config.text_config.max_position_embeddings,
        "limit_mm_per_prompt": {"image": MAX_IMAGES, "video": 0},
        "enable_prefix_caching": True,
        # The default of 4 GiB is kept twice, in the server and in the engine.
        "mm_processor_cache_gb": 1,
        # JSON may hold blanks anywhere, and a small model can go on writing them for ever.
        "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=embedded),
    }
    if not on_cpu:  # On a CPU the model needs the cores.
        arguments["renderer_num_workers"] = num_renderers(len(os.sched_getaffinity(0)))
        arguments["compilation_config"] = dict(ENCODER_GRAPHS)
    if embedded:
        arguments |= {
            "served_model_name": [EMBEDDED_NAME],
            # vLLM would round float32 weights to 16 bits, which a 10 MB model has no use for.
            "dtype": "float32",
            # Its images are small: thousands of frames fit, and no session looks at a frame twice.
            "mm_processor_cache_gb": 0.125,
            # Compiling takes longer than the rest of the start, and brings a tenth (docs/benchmarks.md).
            "enforce_eager": on_cpu,
        }
    return arguments


def num_renderers(num_cores: int) -> int:
    """Return the number of threads that render requests beside a GPU, of the cores that this process may use."""
    return max(1, min(MAX_RENDERERS, num_cores // 4))


def set_environment(variables: Mapping[str, str], *, live: bool) -> None:
    """Set these variables unless they are set already; those that guard the server are always set.

    Args:
        variables: See `engine_arguments`.
        live: Whether the server has live sessions.

    Raises:
        ConfigError: the package was installed before it had its endpoints.
    """
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_MEDIA_CONNECTOR"] = CONNECTOR
    enable_endpoints([HTTP_PLUGIN, LIVE_PLUGIN] if live else [HTTP_PLUGIN])


def enable_endpoints(endpoints: list[str]) -> None:
    """Enable endpoint plugins of this package, in the environment variable VLLM_PLUGINS.

    Args:
        endpoints: Names of entry points.

    Raises:
        ConfigError: the package was installed before it had them.
    """
    for name in endpoints:
        if name not in entry_points(group="vllm.endpoint_plugins").names:
            raise ConfigError(
                f"The installed package does not name its endpoint {name!r}: it was installed before its code was "
                "changed. Install it again (pip install -e .)."
            )
    os.environ["VLLM_PLUGINS"] = plugins_with(endpoints, os.environ.get("VLLM_PLUGINS"))


def plugins_with(endpoints: list[str], allowed: str | None) -> str:
    """Return a value of `VLLM_PLUGINS` that loads these endpoints besides the default plugins.

    vLLM loads a plugin that adds routes only if this variable names it; once the variable is set, it loads no
    other plugin.

    Args:
        endpoints: Names of entry points.
        allowed: The variable's value, or None if it is not set.
    """
    if allowed is None:
        installed = {plugin.name for group in PLUGIN_GROUPS for plugin in entry_points(group=group)}
        allowed = ",".join(sorted(installed))
    return ",".join([*filter(None, allowed.split(",")), *endpoints])


def embedded_checkpoint() -> Path:
    """Return the folder of the model that comes with the package."""
    from casa_engine.digits import checkpoint_path

    return Path(checkpoint_path())


def read_checkpoint(checkpoint: Path) -> CasaConfig:
    """Read a checkpoint's configuration and check that its weights fit; names on a hub are not looked up.

    Args:
        checkpoint: Its folder.

    Raises:
        CheckpointError: It is no folder, or holds no CASA model.
    """
    if not checkpoint.is_dir():
        got = "is a file" if checkpoint.exists() else "does not exist"
        raise CheckpointError(
            f"The checkpoint {str(checkpoint)!r} {got}: expected a folder with config.json and "
            "*.safetensors. Download it first, or write a random one with casa-checkpoint."
        )
    config = read_config(checkpoint)
    check_tensors(checkpoint, config)
    return config


def runs_on_cpu() -> bool:
    """Return whether vLLM will run on the CPU.

    vLLM finds it out without CUDA; a process that has asked CUDA cannot fork an engine that uses it.
    """
    from vllm.platforms import current_platform

    return current_platform.is_cpu()
