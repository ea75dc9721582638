"""`casa eval`: asks a model or a server the questions of published test sets, and scores its answers.

casa eval chartqa mme --model FOLDER --data DATA              vLLM in this process
casa eval all --url http://localhost:8000/v1 --data DATA      anybody's OpenAI-compatible server
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from casa_bench.model_options import add_key_option, add_model_options, without_key
from casa_bench.workload import bounded
from casa_engine.command import run_command
from casa_engine.errors import InputError
from casa_eval.runner import Protocol
from casa_eval.target import QWEN, QWEN_SYSTEM_PROMPT, Target, default_system_prompt
from casa_eval.tasks import TASKS

DESCRIPTION = "Ask a model the questions of published test sets, from local data, and score its answers."
ALL = "all"


def build_parser(program: str = "casa-eval") -> argparse.ArgumentParser:
    """Return the parser; `program` is the command's name in messages."""
    parser = argparse.ArgumentParser(prog=program, description=DESCRIPTION)
    parser.add_argument("tasks", nargs="+", choices=(*TASKS, ALL), metavar="TASK", help=f"{', '.join(TASKS)}, or {ALL}")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint, for vLLM in this process")
    asked.add_argument("--url", help="the address of an OpenAI-compatible server")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="the data sets, each in a folder of its own"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("evaluation"), help="prefix of what is written (%(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the answers of a run that was interrupted")
    parser.add_argument("--limit", type=bounded(1, 10**9), help="only the first so many samples of each task")
    parser.add_argument(
        "--image-size",
        type=bounded(28, 4096),
        default=Protocol.image_size,
        help="images of more than this squared are scaled down, px (%(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens", type=bounded(1, 4096), default=Protocol.max_new_tokens, help="(%(default)s)"
    )
    parser.add_argument(
        "--system-prompt", help=f'default: "{QWEN_SYSTEM_PROMPT}" for models with {QWEN!r} in their name, else none'
    )
    parser.add_argument(
        "--concurrency", type=bounded(1, 1024), default=16, help="questions that are open at once (%(default)s)"
    )
    add_model_options(parser)
    add_key_option(parser)
    return parser


def main(arguments: list[str] | None = None, program: str = "casa-eval") -> int:
    """Run the command; return the exit status: 1 where a sample has no answer.

    Args:
        arguments: The command line without the command's name; default: this process's.
        program: The command's name in messages.
    """
    given = sys.argv[1:] if arguments is None else arguments
    options = build_parser(program).parse_args(given)
    return run_command(program, lambda: run(options, f"{program} {shlex.join(without_key(given))}"))


def run(options: argparse.Namespace, command: str) -> None:
    """Evaluate one model, print its table and write its report, also of a run that is interrupted.

    Raises:
        CasaError: The data or the model cannot be used, or some samples have no answer.
    """
    from casa_eval.data import DataSet
    from casa_eval.sample_log import refuse_existing

    prefix = options.output
    if not prefix.resolve().parent.is_dir():
        raise InputError(f"--output {prefix} is in a folder that does not exist; make it first.")
    samples = prefix.with_name(f"{prefix.name}.samples.jsonl")
    if not options.resume:
        refuse_existing(samples)
    names = [name for name in TASKS if ALL in options.tasks or name in options.tasks]
    # First, so that data that is not there is seen before a model is loaded.
    datasets = [DataSet(TASKS[name], options.data, is_alone=len(names) == 1) for name in names]
    target = open_target(options)
    try:
        if not options.resume:
            refuse_existing(samples)  # again: another run may have begun while the model was loaded
        measure(options, datasets, target, samples, command)
    finally:
        target.close()


def open_target(options: argparse.Namespace) -> Target:
    """Return what answers; each imports what it needs, and no more.

    Raises:
        CasaError: It cannot be used so.
    """
    if options.url is not None:
        from casa_eval.endpoint_target import EndpointTarget

        return EndpointTarget(options.url, options.served_model, options.api_key, concurrency=options.concurrency)
    from casa_bench.engine_backend import EngineSettings
    from casa_eval.engine_target import EngineTarget

    return EngineTarget(
        options.model,
        EngineSettings(options.dtype, options.kv_cache_gib, options.enforce_eager),
        concurrency=options.concurrency,
        image_size=options.image_size,
        max_new_tokens=options.max_new_tokens,
    )


def measure(options: argparse.Namespace, datasets: list[Any], target: Target, samples: Path, command: str) -> None:
    """Ask all questions; print the table and write the report.

    Raises:
        InputError: The run cannot go on, or some samples have no answer.
    """
    from casa_eval.report import markdown, write_report
    from casa_eval.runner import evaluate, summary
    from casa_eval.sample_log import SampleLog

    default_prompt = default_system_prompt(options.model or target.model)
    system_prompt = default_prompt if options.system_prompt is None else options.system_prompt
    protocol = Protocol(options.image_size, options.max_new_tokens, system_prompt, options.limit)
    settings = {
        "model": target.model,
        "target": target.name,
        "image_size": protocol.image_size,
        "max_new_tokens": protocol.max_new_tokens,
        "system_prompt": protocol.system_prompt,
    }
    log = SampleLog(samples, settings)
    report, complete = options.output.with_name(f"{options.output.name}.json"), False
    tasks: dict[str, dict[str, Any]] = {}
    try:
        for dataset in datasets:
            evaluate(dataset, target, protocol, log)
        complete = True
    finally:
        if len(log):
            tasks = {dataset.task.name: summary(dataset.task, log) for dataset in datasets}
            run_settings = settings | {"limit": protocol.limit, "concurrency": options.concurrency}
            write_report(report, log, target, run_settings, tasks, command, complete=complete)
            print(markdown(target.model, tasks, complete=complete))
            print(f"Written: {report}, {log.path}", file=sys.stderr)
        log.close()
        if not len(log):
            log.path.unlink()
    refuse_failures(tasks, report)


def refuse_failures(tasks: dict[str, dict[str, Any]], report: Path) -> None:
    """Raise InputError where samples have no answer, which ends the command with status 1."""
    failed = {name: figures["failed"] for name, figures in tasks.items() if figures["failed"]}
    if failed:
        shown = ", ".join(f"{name} {count:,}" for name, count in failed.items())
        raise InputError(
            f"samples without an answer: {shown}; they are in no score. {report} says why (`error`). "
            "Ask them again with --resume."
        )


if __name__ == "__main__":
    sys.exit(main())
