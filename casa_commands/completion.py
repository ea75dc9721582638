"""`casa completion SHELL`: prints a script that completes commands and options in bash, zsh or fish.

    parsers of the installed commands -> {command: words that may follow} -> the shell's own language

The parsers are those that the commands themselves use. Printing imports vLLM, which takes seconds: the script is kept
in a file, and imports nothing when a key is pressed.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from importlib import import_module

from casa_commands.missing import run
from casa_commands.scripts import COMMANDS, Parser, Words

# Each place of a command line and what may follow there, with a summary: ("digits",) -> {"train": "Train ..."}.
Table = dict[Words, dict[str, str]]
SUMMARY = "Print the completion script of a shell: bash, zsh or fish."
BASH = """\
# Completes `casa`; printed by `casa completion bash`.
_casa() {
    local word=${COMP_WORDS[COMP_CWORD]} place="" number commands="" options=""
    for ((number = 1; number < COMP_CWORD; number++)); do
        case "$place ${COMP_WORDS[number]}" in
            PLACES) place="$place ${COMP_WORDS[number]}" ;;
        esac
    done
    case "$place" in
CASES
    esac
    case "$word" in
        -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
        *) COMPREPLY=($(compgen -W "$commands" -- "$word")) ;;
    esac
}
complete -o default -F _casa casa
"""
ZSH = """\
# Completes `casa`; printed by `casa completion zsh`.
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""
FISH = """\
# Completes `casa`; printed by `casa completion fish`.
function __casa_at
    set -l place
    for word in (commandline -opc)[2..]
        if contains -- (string join ' ' -- $place $word) PLACES
            set -a place $word
        end
    end
    test "$place" = "$argv"
end
"""


def main(arguments: list[str], program: str, casa: argparse.ArgumentParser) -> int:
    """Print the script; return the exit status.

    Args:
        arguments: What stands behind the command's name.
        program: The command's name in messages.
        casa: The parser of `casa` itself.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="Print a script that completes `casa` in a shell, with the options of what is installed.",
        epilog="Keep it in a file that the shell reads: docs/quickstart.md, 'Completion'.",
    )
    parser.add_argument("shell", choices=SCRIPTS)
    shell = parser.parse_args(arguments).shell
    print(SCRIPTS[shell](read_table(program, casa)), end="")
    return 0


def read_table(program: str, casa: argparse.ArgumentParser) -> Table:
    """Return what may follow where; print which options are left out because a package is not installed."""
    table: Table = dict(walk((), casa))
    table["completion",] |= dict.fromkeys(SCRIPTS, "")
    for parser in [parser for command in COMMANDS for parser in command.parsers]:

        def read(parser: Parser = parser) -> None:
            module, _, function = parser.builder.partition(":")
            built = getattr(import_module(module), function)()
            if parser.place:
                table.setdefault(parser.place[:-1], {}).setdefault(parser.place[-1], built.description or "")
            for place, choices in walk(parser.place, built):
                table.setdefault(place, {}).update(choices)

        run(f"{program}: some options are left out", lambda read=read: read, *parser.extras)
    return table


def walk(words: Words, parser: argparse.ArgumentParser) -> Iterator[tuple[Words, dict[str, str]]]:
    """Yield each place of a parser's command line, and what may follow there."""
    found = {}
    # argparse has no public list of what was added to a parser.
    for action in parser._actions:
        found |= {option: sentence(action.help) for option in action.option_strings if option.startswith("--")}
        if isinstance(action, argparse._SubParsersAction):
            found |= {choice.dest: sentence(choice.help) for choice in action._choices_actions}
            for name, inner in action.choices.items():
                yield from walk((*words, name), inner)
    yield words, found


def sentence(text: str | None) -> str:
    """Return the first line of a help text, without what argparse would fill in."""
    return re.sub(r"\s*\(?%\(\w+\)\w\)?", "", (text or "").strip().partition("\n")[0]).replace("%%", "%")


def bash(table: Table) -> str:
    """Return the script for bash."""
    cases = []
    for place, choices in table.items():
        options = " ".join(word for word in choices if word.startswith("-"))
        commands = " ".join(word for word in choices if not word.startswith("-"))
        name = shlex.quote("".join(f" {word}" for word in place))
        cases.append(f"        {name}) commands={shlex.quote(commands)} options={shlex.quote(options)} ;;")
    places = "|".join(shlex.quote("".join(f" {word}" for word in place)) for place in table if place)
    return BASH.replace("PLACES", places).replace("CASES", "\n".join(cases))


def zsh(table: Table) -> str:
    """Return the script for zsh, which runs bash's."""
    return ZSH + bash(table)


def fish(table: Table) -> str:
    """Return the script for fish, which shows the summaries too."""
    lines = [FISH.replace("PLACES", " ".join(shlex.quote(" ".join(place)) for place in table if place))]
    for place, choices in table.items():
        condition = shlex.quote(" ".join(("__casa_at", *place)))
        for word, words in choices.items():
            what = f"-l {word[2:]}" if word.startswith("-") else f"-f -a {shlex.quote(word)}"
            lines.append(f"complete -c casa -n {condition} {what} -d {quote_for_fish(words)}\n")
    return "".join(lines)


def quote_for_fish(text: str) -> str:
    """Return a text as one word of fish, whose single quotes know two escapes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}
