"""`casa-serve [CHECKPOINT]`: vLLM's OpenAI server with the CASA plugin and CASA's defaults.

The command line is `vllm serve`'s own, read by vLLM's own parser, plus a group "CASA" of
options for what images may be sent. Whatever vLLM can do, this command can.
"""

from __future__ import annotations

import argparse
import errno
import functools
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from casa_engine.errors import CasaError, InputError
from casa_engine.originals.views import resolve_checkpoint
from casa_serving.drain.processes import MIN_BOUND_S, SignalCounter, exit_immediately
from casa_serving.drain.startup_patch import replace_run_server
from casa_serving.early_engine import EarlyEngine, replace_engine_process
from casa_serving.endpoint.plugin_entry import register
from casa_serving.engine_defaults import (
    SHUTDOWN_TIMEOUT_S,
    embedded_checkpoint,
    engine_arguments,
    read_checkpoint,
    runs_on_cpu,
    server_arguments,
    set_environment,
)
from casa_serving.exit_status import INTERRUPTED
from casa_serving.options.image_limits import ALLOW_LOOPBACK, ImageLimits, add_limit_options
from casa_serving.options.live_options import LiveOptions, add_live_options
from casa_serving.options.request_limits import RequestLimits, add_request_options

DESCRIPTION = """Serves a CASA model behind an OpenAI-compatible HTTP endpoint.

Without CHECKPOINT the model inside the package is served. Every option of `vllm serve` is
taken; --help=CASA shows those that are added, --help=all shows all.
"""
# The last one is the outermost.
MIDDLEWARE = [
    "casa_serving.endpoint.image_owner.ImageOwner",
    "casa_serving.endpoint.request_guard.RequestGuard",
    "casa_serving.drain.middleware.Drain",
]
# Folder of the metrics of several API servers; vLLM creates it and relies on the interpreter's exit to remove it.
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


def build_parser(
    defaults: Mapping[str, object] = MappingProxyType({}), program: str = "casa-serve"
) -> argparse.ArgumentParser:
    """Return vLLM's parser for `serve` with CASA's options and defaults.

    Args:
        defaults: Values for options that are not on the command line, by argument name.
        program: The command's name in messages.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog=program)
    subcommands = parser.add_subparsers(dest="subparser", required=True)
    serve = ServeSubcommand().subparser_init(subcommands)
    serve.prog = program
    serve.usage = f"{program} [CHECKPOINT] [options]"
    serve.description = DESCRIPTION
    serve.epilog = f"{program} --help=CASA | --help=all | --help=<option or group> | --ray --help (docs/cluster.md)"
    group = serve.add_argument_group("CASA", "What clients may send")
    add_limit_options(group)
    add_request_options(group)
    add_live_options(group)
    group.add_argument(
        "--allow-loopback-media",
        action="store_true",
        help="let image URLs of allowed domains point to this machine itself (for tests)",
    )
    serve.set_defaults(shutdown_timeout=SHUTDOWN_TIMEOUT_S, **defaults)
    return parser


def parse(argv: list[str], program: str = "casa-serve") -> tuple[argparse.Namespace, dict[str, str]]:
    """Parse the command line, twice: the defaults depend on the checkpoint that it names.

    Returns:
        The arguments for vLLM, and environment variables to set where they are not set.

    Raises:
        CheckpointError: the checkpoint is not one.
        InputError: two options contradict each other, or a limit is invalid.
    """
    named = named_checkpoint(argv, program)
    checkpoint = embedded_checkpoint() if named is None else Path(named)
    folder = resolve_checkpoint(checkpoint)
    engine = functools.partial(engine_arguments, read_checkpoint(folder), embedded=named is None, on_cpu=runs_on_cpu())
    defaults, _ = engine()
    if named is None:
        argv = [str(checkpoint), *argv]
    defaults = {**server_arguments(embedded=named is None), **defaults}
    args = add_guards(build_parser(defaults, program).parse_args(["serve", *argv]))
    if folder != checkpoint:  # a view of an original, which is served under the name that was given
        args.served_model_name = args.served_model_name or [named]
        args.model_tag = args.model = str(folder)
    arguments, variables = engine(live=args.live_max_sessions > 0, given=vars(args))
    return argparse.Namespace(**arguments), variables


def named_checkpoint(argv: list[str], program: str = "casa-serve") -> str | None:
    """Return the checkpoint that the command line names, or None.

    A first argument that is no option is the checkpoint, which can then be checked before vLLM is
    imported. Otherwise vLLM's parser finds it: after options, or in a file (`--config`). That
    parser rejects `--served-model-name` without a model before it reports a missing model.
    """
    if not argv:
        return None
    if not argv[0].startswith("-"):
        return argv[0]
    options = {word.partition("=")[0].replace("_", "-") for word in argv}
    if "--served-model-name" in options and not options & {"--config", "--model"}:
        return None
    # vLLM's own default is a model on a hub.
    args = build_parser({"model": None}, program).parse_args(["serve", *argv])
    return args.model_tag or args.model


def add_guards(args: argparse.Namespace) -> argparse.Namespace:
    """Return vLLM's arguments with CASA's limits and middleware added.

    Mutates:
        args: `media_io_kwargs` and `middleware`.
    """
    media = dict(args.media_io_kwargs or {})
    if media.get("image"):
        raise InputError(
            f"--media-io-kwargs sets {sorted(media['image'])} for images; casa-serve sets how "
            "images are loaded. Use its own options instead (--help=CASA)."
        )
    if args.grpc or os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise InputError(
            "--grpc and VLLM_USE_RUST_FRONTEND start servers of vLLM's that know nothing of the guard for "
            "images. Leave them out, or use `vllm serve` and keep clients away yourself."
        )
    RequestLimits.from_options(vars(args))
    LiveOptions.from_arguments(vars(args))
    if not 0 <= args.port < 2**16:
        raise InputError(f"--port must be a number from 0 to 65535, got {args.port}.")
    limits = ImageLimits.from_options(vars(args)).as_options()
    media["image"] = {**limits, ALLOW_LOOPBACK: args.allow_loopback_media}
    args.media_io_kwargs = media
    # Set in this process by casa_serving.drain.shutdown.
    args.was_asked_to_end, args.engine_processes = False, []
    args.middleware = [*args.middleware, *MIDDLEWARE]
    return args


def has_several_servers(args: argparse.Namespace) -> bool:
    """Return whether vLLM will start several API servers, which need time to shut down.

    Raises:
        InputError: The shutdown timeout is too short to notify their clients.
    """
    count = args.api_server_count if args.api_server_count is not None else args.data_parallel_size
    if count > 1 and args.shutdown_timeout < MIN_BOUND_S:
        raise InputError(
            f"--shutdown-timeout is {args.shutdown_timeout} with {count} API servers, which are killed after it: "
            f"expected at least {MIN_BOUND_S:g} seconds, in which they can tell their clients."
        )
    return count > 1


def main(
    arguments: list[str] | None = None, program: str = "casa-serve", early_engine: EarlyEngine | None = None
) -> int:
    """Run the command; return the exit status. Arguments are those of `run`."""
    # The first process of a container ignores SIGTERM without a handler; vLLM installs the same one later on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(sys.argv[1:] if arguments is None else arguments, program, early_engine)
    except KeyboardInterrupt:
        exit_immediately(INTERRUPTED)


def run(argv: list[str], program: str = "casa-serve", early_engine: EarlyEngine | None = None) -> int:
    """Run the server until it is stopped; return the exit status.

    Args:
        argv: The command line without the command's own name.
        program: The command's name in messages.
        early_engine: A process for the engine, where one was started already.

    Returns:
        0 after a signal, 1 if it could not start or exited by itself, such as after its engine died.
    """
    if argv[:1] == ["--ray"]:
        from casa_serving.cluster.launch import run as run_cluster

        return run_cluster(argv[1:], program)
    try:
        args, variables = parse(argv, program)
        has_several = has_several_servers(args)
        set_environment(variables, live=args.live_max_sessions > 0)
    except CasaError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    register()
    try:
        if has_several:
            serve_in_processes(args, program)
        serve_in_process(args, early_engine)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        print(
            f"{program}: port {args.port} is in use. Stop what listens there, or pass another "
            "with --port (make serve PORT=...).",
            file=sys.stderr,
        )
        return 1


def serve_in_process(args: argparse.Namespace, early_engine: EarlyEngine | None = None) -> NoReturn:
    """Serve in this process until shutdown, then exit.

    All clients have their final messages and the engine has exited by then. The interpreter's own cleanup, with threads
    that may still decode images, would take seconds that the shutdown timeout does not leave.
    """
    replace_run_server(lambda: exit_immediately(INTERRUPTED))
    if early_engine is not None:
        replace_engine_process(early_engine)
    run_vllm(args)
    sys.stdout.flush()
    exit_immediately(0 if args.was_asked_to_end else 1, args.engine_processes)


def serve_in_processes(args: argparse.Namespace, program: str) -> NoReturn:
    """Serve in several API server processes, of which this is the parent, until shutdown, then exit."""
    signals = SignalCounter()
    signals.start()
    is_own_folder = METRICS_FOLDER not in os.environ
    status = 1
    try:
        run_vllm(args)
    except SystemExit as left:  # Raised by the signal handler of vLLM's parent process.
        status = 1 if left.code else 0
    except RuntimeError as error:  # One of the others has died.
        print(f"{program}: {error}", file=sys.stderr)
    if is_own_folder:
        shutil.rmtree(os.environ.get(METRICS_FOLDER, ""), ignore_errors=True)
    sys.stdout.flush()
    exit_immediately(status, signals.started)


def run_vllm(args: argparse.Namespace) -> None:
    """Run vLLM's own command."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    command = ServeSubcommand()
    command.validate(args)
    command.cmd(args)


if __name__ == "__main__":
    sys.exit(main())
