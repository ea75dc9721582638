"""`casa COMMAND`: one front door to all commands.

Help, version and mistakes are answered here without importing torch or vLLM; everything behind a command's name goes
to that command as it stands, which is the function that the command's console script (`casa-serve`, ...) ends in too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from casa_commands import completion, scripts

DESCRIPTION = "Serve, caption with, export and check CASA vision-language models."
EPILOG = "`casa COMMAND --help` explains a command. Each has its own name too: casa-serve is `casa serve`."
DIGITS = "Train, measure and film the embedded model, casa-tiny-digits."


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        run: Takes the words behind the command's name, and the name for messages; returns the exit status.
        summary: One sentence for `--help`.
    """

    run: Callable[[list[str], str], int]
    summary: str


COMMANDS = {
    ("serve",): Command(scripts.serve, "Serve a model behind an OpenAI-compatible endpoint, with a web page."),
    ("caption",): Command(scripts.caption, "Caption a video file, a URL or a camera, and write subtitles."),
    ("export",): Command(scripts.export, "Export a model to ONNX and TensorRT, or ask an exported one."),
    ("checkpoint",): Command(scripts.checkpoint, "Check a checkpoint folder, or write one with random weights."),
    ("digits", "train"): Command(scripts.train_digits, "Train the embedded model from nothing."),
    ("digits", "eval"): Command(scripts.eval_digits, "Measure how well a model or a server reads digits."),
    ("digits", "video"): Command(scripts.digits_video, "Write a video of digits that change, and its truth."),
    ("completion",): Command(
        lambda arguments, program: completion.main(arguments, program, build_parser()),
        "Print the completion script of a shell: bash, zsh or fish.",
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of everything that stands before a command's own arguments."""
    parser = argparse.ArgumentParser(prog="casa", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"casa-engine {version('casa-engine')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    groups = {(): commands}
    for words, command in COMMANDS.items():
        if words[:-1] not in groups:
            group = commands.add_parser(words[0], help=DIGITS, description=DIGITS)
            groups[words[:-1]] = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
        groups[words[:-1]].add_parser(words[-1], help=command.summary, description=command.summary)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run `casa`; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for words, command in COMMANDS.items():
        if tuple(arguments[: len(words)]) == words:
            return command.run(arguments[len(words) :], " ".join(("casa", *words)))
    parser = build_parser()
    # Help, version and unknown words end here; what is left is an option of a command in front of its name.
    parser.parse_args(arguments or ["--help"])
    parser.error("the command comes first: casa COMMAND ...")
