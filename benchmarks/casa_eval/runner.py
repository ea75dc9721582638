"""Asks a model all questions of a task, and scores its answers; what goes wrong with one sample ends no run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from casa_engine.errors import InputError
from casa_eval.data import DataSet
from casa_eval.images import decode
from casa_eval.sample_log import Record, SampleLog
from casa_eval.target import Request, Target, question
from casa_eval.tasks import Fields, Outcome, Task

# Answers after which progress is shown.
SHOWN_ANSWERS = 100


@dataclass(frozen=True)
class Protocol:
    """How questions are asked.

    Attributes:
        image_size: Images of more than this squared are scaled down, px.
        max_new_tokens: The longest answer.
        system_prompt: What stands in front, "" for nothing.
        limit: The first so many samples of each task; None for all.
    """

    image_size: int = 896
    max_new_tokens: int = 128
    system_prompt: str = ""
    limit: int | None = None


def evaluate(dataset: DataSet, target: Target, protocol: Protocol, log: SampleLog) -> None:
    """Ask what the log does not hold yet, and write each answer and its score to it.

    Raises:
        InputError: The data cannot be read, or is not what the log was made of, or the model answers nobody.
    """
    task, answered = dataset.task, 0
    with dataset.opened():
        for request, reply in target.answer(open_questions(dataset, protocol, log)):
            record, fields = request.key
            if isinstance(reply, str):
                log.add(record | {"answer": reply, "score": task.score(reply, fields)})
            else:
                log.add(record | {"error": str(reply)})
            answered += 1
            if answered % SHOWN_ANSWERS == 0:
                print(f"{task.name}: {answered:,} answers", file=sys.stderr)


def open_questions(dataset: DataSet, protocol: Protocol, log: SampleLog) -> Iterator[Request]:
    """Yield the questions that the log holds no answer to; samples that cannot be asked are written to it at once.

    Raises:
        InputError: The data cannot be read, or has changed since the log was begun.
    """
    task = dataset.task
    for sample in dataset.samples():
        if protocol.limit is not None and sample.index >= protocol.limit:
            return
        key = (task.name, sample.index)
        record: Record = {"task": task.name, "id": sample.index}
        fields, image, fault = {}, None, None
        try:
            fields = task.read_fields(sample.row)
            record |= described(task, fields)
            if key not in log:
                image = decode(dataset.image(sample), protocol.image_size)
        except InputError as error:
            fault = str(error)
        if key in log:
            check_unchanged(log.read(key), record, log)
        elif fault is not None:
            log.add(record | {"error": fault})
        else:
            messages = question(record["prompt"], [image], protocol.system_prompt)
            yield Request((record, fields), messages, protocol.max_new_tokens)


def described(task: Task, fields: Fields) -> Record:
    """Return what a record says of a sample before it is answered."""
    outcome = task.outcome(0.0, fields)
    parts = {"group": outcome.group, "pair": outcome.pair}
    return {
        "question": fields["question"],
        "prompt": task.prompt(fields),
        "references": task.references(fields),
    } | {name: value for name, value in parts.items() if value}


def check_unchanged(kept: Record, record: Record, log: SampleLog) -> None:
    """Check that an answer that is kept is one to this question.

    Raises:
        InputError: It is not.
    """
    if any(kept.get(name) != record.get(name) for name in ("prompt", "references")):
        raise InputError(
            f"{log.path} holds an answer to another question as {record['task']} {record['id']}: the data has changed. "
            "Choose another --output."
        )


def summary(task: Task, log: SampleLog) -> dict[str, Any]:
    """Return the figures of a task: `samples`, `failed`, and those of its metric over the answered ones."""
    outcomes, failed = [], 0
    for record in log.records(task.name):
        if "error" in record:
            failed += 1
        else:
            outcomes.append(Outcome(record["score"], record.get("group", ""), record.get("pair", "")))
    about = {"metric": task.metric, "source": task.source, "split": task.split}
    return {**about, "samples": len(outcomes) + failed, "failed": failed, **task.summarize(outcomes)}
