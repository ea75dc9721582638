"""`casa-eval-digits`: how well casa-tiny-digits reads held-out digits, in process or through an endpoint."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from casa_digits.cases import (
    COUNT,
    NUM_FRAMES_ASKED,
    READ,
    REPORT,
    TOOL_RESULT,
    FormCase,
    Suite,
    ToolCase,
    Turn,
    draw_forms,
    draw_suites,
    draw_tools,
    draw_video,
)
from casa_digits.data import DigitImage
from casa_digits.endpoint import EndpointRunner
from casa_digits.live_endpoint import EndpointStream
from casa_digits.memory import QUESTIONS, recall
from casa_digits.phrases import WATCH
from casa_digits.runners import EagerRunner, EagerStream, Message, Runner, Stream
from casa_engine.command import run_command
from casa_engine.digits import checkpoint_path
from casa_engine.errors import InputError

DESCRIPTION = "How well casa-tiny-digits reads held-out digits, in process or through an endpoint."
MIN_CHANGES_CAPTIONED = 0.90
MAX_UNCHANGED_CAPTIONED = 0.05
MIN_RIGHT = 0.95
TEXT_BUDGETS = (256, 512)
MIN_SHARES = {"read": 0.90, "second": 0.90, "count": 0.95, "first": 0.95, "last": 0.95, "before": 0.95}


@dataclass(frozen=True)
class Score:
    """One line of the result: how many of how many, and what is demanded.

    Attributes:
        limit: The share demanded: the smallest allowed, or the largest where `at_most`.
    """

    name: str
    right: int
    total: int
    limit: float
    at_most: bool = False

    @property
    def share(self) -> float:
        """Share of right answers, 0..1."""
        return self.right / max(1, self.total)

    @property
    def passed(self) -> bool:
        """Whether the demand is met."""
        return self.share <= self.limit if self.at_most else self.share >= self.limit


@dataclass(frozen=True)
class Report:
    """All scores of one evaluation."""

    scores: list[Score]

    @property
    def passed(self) -> bool:
        """Whether every demand is met."""
        return all(score.passed for score in self.scores)

    def as_dict(self) -> dict[str, float]:
        """Return the shares by name."""
        return {score.name: round(score.share, 4) for score in self.scores}

    def table(self) -> str:
        """Return the report as text."""
        lines = [f"{'':24}{'right':>12}{'share':>9}{'demanded':>11}"]
        for score in self.scores:
            sign = "<=" if score.at_most else ">="
            mark = "" if score.passed else "  MISSED"
            amount = f"{score.right}/{score.total}"
            lines.append(f"{score.name:24}{amount:>12}{score.share:>9.1%}{sign:>5}{score.limit:>6.0%}{mark}")
        return "\n".join(lines)


def play(runner: Runner, turns: list[Turn]) -> bool:
    """Run one conversation with the model's own answers as its history; True if the last answer is right."""
    messages: list[Message] = []
    answers: list[str] = []
    for turn in turns:
        content = [] if turn.image is None else [{"type": "image", "image": turn.image.to_pil()}]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.question}]})
        answers.append(runner.answer(messages))
        messages.append({"role": "assistant", "content": answers[-1]})
    *before, last = answers
    expected = turns[-1].expected
    if isinstance(expected, str):
        return last == expected
    # Where two answers are the same, it cannot be seen which of them was found.
    return last == before[expected] and len(set(before)) == len(before)


def _show(image: DigitImage, question: str) -> list[Message]:
    content = [{"type": "image", "image": image.to_pil()}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def play_form(runner: Runner, case: FormCase) -> bool:
    """Ask for one answer in JSON; True if it is right."""
    return runner.fill(_show(case.image, case.question), case.form) == case.expected


def play_tool(runner: Runner, case: ToolCase) -> bool:
    """Offer a tool; True if it is called with the right arguments, and what is said to its result is right."""
    messages = _show(case.image, REPORT)
    call = runner.call(messages, case.tools)
    if call is None or call["tool_calls"][0]["function"] != {"name": case.name, "arguments": case.arguments}:
        return False
    messages += [call, {"role": "tool", "tool_call_id": call["tool_calls"][0].get("id"), "content": TOOL_RESULT}]
    return runner.answer(messages, case.tools) == case.image.text


def run_suites(runner: Runner, suites: list[Suite]) -> list[Score]:
    """Return one score for each suite."""
    scores = []
    for suite in suites:
        # Closed on the way out of an error, so that the message about it has a line of its own.
        with tqdm(suite.conversations, desc=suite.name, mininterval=2.0) as conversations:
            right = [play(runner, turns) for turns in conversations]
        scores.append(Score(suite.name, sum(right), len(right), suite.threshold))
    return scores


def run_forms(runner: Runner, seed: int = 0, scale: float = 1.0) -> list[Score]:
    """Return the scores of JSON with a schema, of JSON without one, and of tools."""
    forms = draw_forms(seed, scale)
    played: dict[str, list[bool]] = {}
    for name, cases in forms.items():
        with tqdm(cases, desc=name, mininterval=2.0) as shown:
            played[name] = [play_form(runner, case) for case in shown]
    with tqdm(draw_tools(seed, scale), desc="tool", mininterval=2.0) as shown:
        played["tool"] = [play_tool(runner, case) for case in shown]
    return [Score(name, sum(right), len(right), MIN_RIGHT) for name, right in played.items()]


def run_questions(open_stream: Callable[[int], Stream], seed: int = 0, scale: float = 1.0) -> list[Score]:
    """Ask questions in live streams, each after some frames of a video of its own, all kinds in random order.

    What was read before is what the stream's own captions say, right or wrong, as far as they are still in its text.

    Args:
        open_stream: Opens the stream of this number.
        seed: Of videos and questions.
        scale: 1: twenty streams for each number of frames.
    """
    right: dict[str, list[bool]] = {name: [] for name in ("read", "count", *QUESTIONS)}
    numbers = [number for number in NUM_FRAMES_ASKED for _ in range(max(1, round(20 * scale)))]
    for index, num_frames in enumerate(tqdm(numbers, desc="questions", mininterval=2.0)):
        rng = np.random.default_rng([seed, 3, index])
        video = draw_video(rng, num_frames)
        with open_stream(index) as stream:
            for frame in video.frames:
                stream.caption(Image.fromarray(frame))
            for kind in rng.permutation(list(right)):
                question = {"read": READ, "count": COUNT}.get(kind) or QUESTIONS[kind][0]
                # Room for a question is made before it is asked: what is forgotten by then is not asked for.
                answer = stream.ask(question)
                truth = {"read": video.texts[-1], "count": str(len(video.texts[-1].split()))}.get(kind)
                right[kind].append(answer == (recall(kind, stream.captions) if truth is None else truth))
    names = {f"asked: {kind}": answers for kind, answers in right.items()}
    return [Score(name, sum(right), len(right), MIN_RIGHT) for name, right in names.items()]


def run_streams(runner: EagerRunner, num_videos: int, num_frames: int, seed: int = 0) -> list[Score]:
    """Caption videos of held-out digits under different text budgets."""
    changes: list[bool] = []
    unchanged: list[bool] = []
    for number in tqdm(range(num_videos), desc="streams", mininterval=2.0):
        video = draw_video(np.random.default_rng([seed, number]), num_frames)
        stream = EagerStream(runner, WATCH[number % len(WATCH)], TEXT_BUDGETS[number % len(TEXT_BUDGETS)])
        before = None
        for frame, text in zip(video.frames, video.texts, strict=True):
            said = stream.caption(Image.fromarray(frame))
            if text == before:
                unchanged.append(said != "")
            else:
                changes.append(said == text)
            before = text
    return [
        Score("stream: changes", sum(changes), len(changes), MIN_CHANGES_CAPTIONED),
        Score("stream: repeated", sum(unchanged), len(unchanged), MAX_UNCHANGED_CAPTIONED, at_most=True),
    ]


def evaluate_eager(checkpoint: Path, scale: float = 1.0, seed: int = 0) -> Report:
    """Run all chats, JSON, tools, streams and questions within them with the eager model."""
    return _run_eager(checkpoint, draw_suites(seed, scale), scale, seed)


def _run_eager(checkpoint: Path, suites: list[Suite], scale: float, seed: int) -> Report:
    runner = EagerRunner(checkpoint)
    scores = [*run_suites(runner, suites), *run_forms(runner, seed, scale)]
    scores += run_streams(runner, max(1, round(8 * scale)), 120, seed)

    def open_stream(index: int) -> AbstractContextManager[EagerStream]:
        return nullcontext(EagerStream(runner, WATCH[index % len(WATCH)], TEXT_BUDGETS[index % len(TEXT_BUDGETS)]))

    return Report([*scores, *run_questions(open_stream, seed, scale)])


def build_parser(program: str = "casa-eval-digits") -> argparse.ArgumentParser:
    """Return the parser; `program` is the command's name in messages."""
    parser = argparse.ArgumentParser(prog=program, description=DESCRIPTION)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=checkpoint_path(), help="folder (%(default)s)")
    parser.add_argument("--base-url", help="asks this OpenAI-compatible server instead (http://127.0.0.1:8000/v1)")
    parser.add_argument("--model", help="the model's name at the server; default: the first it serves")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="of the server ($OPENAI_API_KEY)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="1: 200 single images, 100 conversations of each kind")
    parser.add_argument("--threads", type=int, default=1, help="of the eager model; more gain little (%(default)s)")
    parser.add_argument("--no-live", action="store_true", help="with --base-url: asks nothing of /v1/live")
    for name, default in MIN_SHARES.items():
        parser.add_argument(f"--min-{name}", type=float, default=default, help="smallest share right (%(default)s)")
    return parser


def main(arguments: list[str] | None = None, program: str = "casa-eval-digits") -> int:
    """Print the table; return the exit status: 1 if a demand is missed or the model cannot be run.

    Args:
        arguments: The command line without the command's name; default: this process's.
        program: The command's name in messages.
    """
    options = build_parser(program).parse_args(arguments)
    return run_command(program, lambda: print_report(evaluate(options)))


def print_report(report: Report) -> int:
    """Print the table; return the exit status, 1 if a demand is missed."""
    print(report.table())
    return 0 if report.passed else 1


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for an option out of its range."""
    for name, least in (("seed", 0), ("threads", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name} is {getattr(options, name)}; expected {least} or more.")
    if not 0 < options.scale < math.inf:
        raise InputError(f"--scale is {options.scale}; expected a number above 0.")
    for name in MIN_SHARES:
        share = getattr(options, f"min_{name}")
        if not 0 <= share <= 1:
            raise InputError(f"--min-{name} is {share}; expected 0 to 1.")


def evaluate(options: argparse.Namespace) -> Report:
    """Evaluate the server or the eager model, as the command line chooses.

    Raises:
        CasaError: An option is out of its range, the checkpoint is none, or the server does not answer as it should.
    """
    check_options(options)
    # First, so that a server that is not there is seen at once.
    endpoint = EndpointRunner(options.base_url, options.model, options.api_key) if options.base_url else None
    suites = [
        Suite(suite.name, suite.conversations, getattr(options, f"min_{suite.name}"))
        for suite in draw_suites(options.seed, options.scale)
    ]
    if endpoint is None:
        torch.set_num_threads(options.threads)
        return _run_eager(options.checkpoint, suites, options.scale, options.seed)
    scores = [*run_suites(endpoint, suites), *run_forms(endpoint, options.seed, options.scale)]
    if not options.no_live:
        scores += run_questions(
            lambda _: EndpointStream(options.base_url, options.api_key), options.seed, options.scale
        )
    return Report(scores)


if __name__ == "__main__":
    sys.exit(main())
