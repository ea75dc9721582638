"""`casa COMMAND`: one command with all others as its subcommands.

Help, version and mistakes are answered here without importing torch or vLLM; everything behind a command's name goes
to that command as it stands, which is also what the command's console script (`casa-serve`, ...) calls.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version

from casa_commands import completion
from casa_commands.scripts import COMMANDS

DESCRIPTION = "Serve, caption with, export and check CASA vision-language models."
EPILOG = "`casa COMMAND --help` explains a command. Each has its own name too: casa-serve is `casa serve`."
# Of words that several commands share.
GROUPS = {("digits",): "Train, measure and film the embedded model, casa-tiny-digits."}
# The one command that is no script of its own: it needs the parser of this one.
COMPLETION = ("completion",)
# By the words behind `casa`.
SUMMARIES = {command.words: command.summary for command in COMMANDS} | {COMPLETION: completion.SUMMARY}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of everything that stands before a command's own arguments."""
    parser = argparse.ArgumentParser(prog="casa", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"casa-engine {version('casa-engine')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    groups = {(): commands}
    for words, summary in SUMMARIES.items():
        if words[:-1] not in groups:
            about = GROUPS[words[:-1]]
            group = commands.add_parser(words[0], help=about, description=about)
            groups[words[:-1]] = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
        groups[words[:-1]].add_parser(words[-1], help=summary, description=summary)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run `casa`; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for command in COMMANDS:
        if tuple(arguments[: len(command.words)]) == command.words:
            return command(arguments[len(command.words) :], " ".join(("casa", *command.words)))
    if tuple(arguments[:1]) == COMPLETION:
        return completion.main(arguments[1:], "casa completion", build_parser())
    parser = build_parser()
    # Help, version and unknown words end here; what is left is an option of a command in front of its name.
    parser.parse_args(arguments or ["--help"])
    parser.error("the command comes first: casa COMMAND ...")
