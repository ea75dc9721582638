"""`casa bench`: measures a checkpoint or a server, and writes a table, a JSON and a plot.

casa bench stream CHECKPOINT --output ca        eager, or vLLM in this process
casa bench stream http://localhost:8000/v1      anybody's OpenAI-compatible server
casa bench report ca.json insertion.json --output both
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from casa_bench.backend import Backend
from casa_bench.chat import CHAT
from casa_bench.live import LIVE
from casa_bench.model_options import add_key_option, add_model_options, without_key
from casa_bench.reuse import REUSE
from casa_bench.stream import STREAM
from casa_bench.workload import Row, Workload
from casa_engine.command import run_command
from casa_engine.errors import InputError

DESCRIPTION = "Measure what frames, conversations, live sessions and second questions cost."
WORKLOADS = {workload.name: workload for workload in (STREAM, CHAT, LIVE, REUSE)}
# The backends whose model is a folder, and that of an address.
LOCAL, ENDPOINT = ("eager", "engine"), "endpoint"
# Rows of which each is announced, and then one in so many.
SHOWN_ROWS = 16
# Options that no report holds.
PRIVATE = {"api_key"}
NOT_SETTINGS = {"workload", "model", "backend", "output", "name", "quiet"}


def build_parser(program: str = "casa-bench") -> argparse.ArgumentParser:
    """Return the parser; `program` is the command's name in messages."""
    parser = argparse.ArgumentParser(prog=program, description=DESCRIPTION)
    commands = parser.add_subparsers(dest="workload", required=True, metavar="WORKLOAD")
    for workload in WORKLOADS.values():
        described = (sys.modules[workload.run.__module__].__doc__ or "").partition("\n\n")[2]
        command = commands.add_parser(
            workload.name,
            help=workload.summary,
            description=f"{workload.summary}\n\n{described}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_model_options(command, workload)
        workload.add_options(command)
    report = commands.add_parser(
        "report", help="Put reports together: one table, one JSON, one plot.", description="Put reports together."
    )
    report.add_argument("reports", nargs="+", type=Path, help="JSON files of the same workload")
    report.add_argument("--output", type=Path, required=True, help="prefix of what is written")
    return parser


def _add_model_options(parser: argparse.ArgumentParser, workload: Workload) -> None:
    if workload.needs is None:
        parser.add_argument("model", metavar="URL", help="address of a running casa serve")
    else:
        parser.add_argument("model", metavar="MODEL", help="a checkpoint's folder, or the address of a server")
        parser.add_argument(
            "--backend", choices=(*LOCAL, ENDPOINT), help="default: engine for a folder, endpoint for an address"
        )
        add_model_options(parser)
        parser.add_argument(
            "--may-stop", action="store_true", help="endpoint: do not send ignore_eos, which not every server knows"
        )
    add_key_option(parser)
    parser.add_argument("--name", help="of the model in the report; default: the folder's, or the served model's")
    parser.add_argument("--output", type=Path, help="prefix of what is written; default: casa-bench-WORKLOAD")


def main(arguments: list[str] | None = None, program: str = "casa-bench") -> int:
    """Run the command; return the exit status.

    Args:
        arguments: The command line without the command's name; default: this process's.
        program: The command's name in messages.
    """
    given = sys.argv[1:] if arguments is None else arguments
    options = build_parser(program).parse_args(given)
    if options.workload == "report":
        return run_command(program, lambda: put_together(options.reports, options.output))
    return run_command(program, lambda: measure(options, f"{program} {shlex.join(without_key(given))}"))


def measure(options: argparse.Namespace, command: str) -> None:
    """Measure one model, print its table and write its report, also of a run that is interrupted.

    Raises:
        CasaError: The model cannot be measured so.
    """
    from casa_bench.report import markdown, run_record, write_report

    workload = WORKLOADS[options.workload]
    prefix = options.output or Path(f"casa-bench-{workload.name}")
    if not prefix.resolve().parent.is_dir():
        raise InputError(f"--output {prefix} is in a folder that does not exist; make it first.")
    settings = {name: value for name, value in vars(options).items() if name not in NOT_SETTINGS}
    rows: list[Row] = []
    complete = False
    with backend_of(options, workload) as (measured, name, kind, about):
        try:
            for row in workload.run(measured, settings):
                rows.append(row)
                if len(rows) <= SHOWN_ROWS or len(rows) % SHOWN_ROWS == 0:
                    print(f"{workload.name}: {len(rows)} of {name} measured", file=sys.stderr)
            complete = True
        finally:
            if rows:
                shown = {key: value for key, value in settings.items() if key not in PRIVATE}
                run = run_record(workload, name, kind, about, shown, rows, command, complete=complete)
                paths = write_report(workload, [run], prefix)
                print(markdown(workload, [run]))
                print(f"Written: {', '.join(map(str, paths))}", file=sys.stderr)


@contextmanager
def backend_of(
    options: argparse.Namespace, workload: Workload
) -> Iterator[tuple[Backend | str, str, str, dict[str, Any]]]:
    """Give what a workload measures, its name in the report, the backend's name, and what it says of itself.

    Raises:
        CasaError: It cannot be used so.
    """
    if workload.needs is None:
        if not is_address(options.model):
            raise InputError(
                f"{options.model!r} is not an address; live sessions are those of a server: start casa serve, and pass "
                "its address, such as http://127.0.0.1:8000."
            )
        yield options.model, options.name or options.model, ENDPOINT, {}
        return
    kind = options.backend or (ENDPOINT if is_address(options.model) else "engine")
    if (kind == ENDPOINT) != is_address(options.model):
        expected = "the address of a server" if kind == ENDPOINT else "a checkpoint's folder"
        raise InputError(f"{options.model!r} with --backend {kind}; expected {expected}.")
    backend = open_backend(kind, options, workload)
    try:
        name = options.name or backend.about.get("model") or Path(options.model).resolve().name
        yield backend, name, kind, backend.about
    finally:
        backend.close()


def open_backend(kind: str, options: argparse.Namespace, workload: Workload) -> Backend:
    """Return the backend of that name; each imports what it needs, and no more.

    Raises:
        CasaError: It cannot be made so.
    """
    assert workload.needs is not None
    needs = workload.needs(vars(options))
    if kind == ENDPOINT:
        from casa_bench.endpoint_backend import EndpointBackend

        return EndpointBackend(
            options.model, needs, options.served_model, options.api_key, ignore_eos=not options.may_stop
        )
    if kind == "eager":
        import torch

        from casa_bench.eager_backend import EagerBackend

        dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
        return EagerBackend(Path(options.model), needs, dtype)
    from casa_bench.engine_backend import EngineBackend, EngineSettings

    settings = EngineSettings(options.dtype, options.kv_cache_gib, options.enforce_eager)
    return EngineBackend(Path(options.model), needs, settings)


def is_address(model: str) -> bool:
    """Return whether a model is named by the address of its server."""
    return "://" in model


def put_together(paths: list[Path], prefix: Path) -> None:
    """Write one report of all runs of several, in their order.

    Raises:
        InputError: One is no report, or they are of different workloads.
    """
    from casa_bench.report import markdown, read_report, write_report

    reports = [read_report(path) for path in paths]
    names = [report["workload"] for report in reports]
    if len(set(names)) > 1 or names[0] not in WORKLOADS:
        raise InputError(f"the reports are of {', '.join(map(str, names))}; expected one of {', '.join(WORKLOADS)}.")
    workload, runs = WORKLOADS[names[0]], [run for report in reports for run in report["runs"]]
    write_report(workload, runs, prefix)
    print(markdown(workload, runs))


if __name__ == "__main__":
    sys.exit(main())
