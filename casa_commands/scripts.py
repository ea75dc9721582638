"""Every command once: its names, its module, its parsers, and the extras with what these import.

`casa COMMAND`, the console scripts and the completion all read this table. Nothing is imported before a command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from casa_commands.missing import run

Words = tuple[str, ...]


@dataclass(frozen=True)
class Parser:
    """One parser of a command.

    Attributes:
        place: The words in front of its own arguments; none where it reads the command's word itself, as vLLM's does.
        builder: "module:function", which returns it.
        extras: The extras that its part of the command needs, as for `missing.run`.
    """

    place: Words
    builder: str
    extras: Words = ()


@dataclass(frozen=True)
class Command:
    """One command; called, it runs.

    Attributes:
        words: What stands behind `casa`.
        script: The command's own name (pyproject.toml).
        module: The module whose `main` takes the arguments and the name for messages, and returns the exit status.
        summary: One sentence for `--help`.
        parsers: Its parsers, those for longer command lines last.
    """

    words: Words
    script: str
    module: str
    summary: str
    parsers: tuple[Parser, ...]

    def __call__(self, arguments: list[str] | None = None, program: str | None = None) -> int:
        """Run the command; return the exit status.

        Args:
            arguments: What stands behind its name; None for this process's command line.
            program: Its name in messages; None for the script's.
        """
        arguments = sys.argv[1:] if arguments is None else arguments
        program = program or self.script

        def load() -> Callable[[], int]:
            return partial(import_module(self.module).main, arguments, program)

        return run(program, load, *self.extras(arguments))

    def extras(self, arguments: list[str]) -> Words:
        """Return the extras that a command line needs: those of the last parser whose place it has."""
        line = (*self.words, *arguments)
        return [parser.extras for parser in self.parsers if line[: len(parser.place)] == parser.place][-1]


serve = Command(
    ("serve",),
    "casa-serve",
    "casa_serving.serve",
    "Serve a model behind an OpenAI-compatible endpoint, with a web page.",
    (
        Parser((), "casa_serving.cli:build_parser", ("cpu",)),
        Parser(("serve", "--ray"), "casa_serving.cluster.launch:build_parser", ("cpu", "ray")),
    ),
)
caption = Command(
    ("caption",),
    "casa-caption",
    "casa_serving.caption.cli",
    "Caption a video file, a URL or a camera, and write subtitles.",
    (Parser(("caption",), "casa_serving.caption.options:build_parser", ("live", "cpu")),),
)
export = Command(
    ("export",),
    "casa-export",
    "casa_export.cli",
    "Export a model to ONNX and TensorRT, or ask an exported one.",
    (
        Parser(("export",), "casa_export.cli:export_parser", ("export", "trt")),
        Parser(("export", "run"), "casa_export.cli:run_parser", ("export", "trt")),
    ),
)
checkpoint = Command(
    ("checkpoint",),
    "casa-checkpoint",
    "casa_engine.checkpoint_cli",
    "Inspect, convert and check checkpoints, or write random ones.",
    (Parser(("checkpoint",), "casa_engine.checkpoint_cli:build_parser"),),
)
bench = Command(
    ("bench",),
    "casa-bench",
    "casa_bench.cli",
    "Measure what frames, conversations, live sessions and second questions cost.",
    (Parser(("bench",), "casa_bench.cli:build_parser", ("cpu", "serving", "live")),),
)
evaluate = Command(
    ("eval",),
    "casa-eval",
    "casa_eval.cli",
    "Ask a model the questions of published test sets, and score its answers.",
    (Parser(("eval",), "casa_eval.cli:build_parser", ("eval", "cpu")),),
)
train_digits = Command(
    ("digits", "train"),
    "casa-train-digits",
    "casa_digits.train",
    "Train the embedded model from nothing.",
    (Parser(("digits", "train"), "casa_digits.train:build_parser", ("digits",)),),
)
eval_digits = Command(
    ("digits", "eval"),
    "casa-eval-digits",
    "casa_digits.evaluate",
    "Measure how well a model or a server reads digits.",
    (Parser(("digits", "eval"), "casa_digits.evaluate:build_parser", ("digits", "serving")),),
)
digits_video = Command(
    ("digits", "video"),
    "casa-digits-video",
    "casa_digits.video",
    "Write a video of digits that change, and its truth.",
    (Parser(("digits", "video"), "casa_digits.video:build_parser", ("digits",)),),
)
# In the order of `casa --help`.
COMMANDS = (serve, caption, export, checkpoint, bench, evaluate, train_digits, eval_digits, digits_video)
