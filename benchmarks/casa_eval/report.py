"""What a run leaves behind: one table, and one JSON with every sample.

{"format": "casa-eval", "version": 1, "model": ..., "target": ..., "about": {...}, "settings": {...}, "command": ...,
 "date": ..., "commit": ..., "versions": {...}, "machine": {...}, "complete": true, "tasks": {"chartqa": {...}},
 "samples": [{"task": ..., "id": ..., "question": ..., "prompt": ..., "references": [...],
              "answer": ..., "score": ... or "error": ...}]}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from casa_bench.published import table
from casa_bench.report import provenance
from casa_engine.atomic_files import replaced_atomically
from casa_eval.published import published_table
from casa_eval.sample_log import SampleLog
from casa_eval.target import Target
from casa_eval.tasks import TASKS

FORMAT, VERSION = "casa-eval", 1


def write_report(
    path: Path,
    log: SampleLog,
    target: Target,
    settings: dict[str, Any],
    tasks: dict[str, dict[str, Any]],
    command: str,
    *,
    complete: bool,
) -> None:
    """Write the JSON, a sample at a time.

    Raises:
        OSError: It cannot be written; what was there is unchanged.
    """
    head = {
        "format": FORMAT,
        "version": VERSION,
        "model": target.model,
        "target": target.name,
        "about": target.about,
        "settings": settings,
        "command": command,
        **provenance(),
        "complete": complete,
        "tasks": tasks,
    }
    with replaced_atomically(path) as part, part.open("w") as file:
        file.write(json.dumps(head, indent=1).removesuffix("\n}") + ',\n "samples": [')
        separator = "\n  "
        for name in tasks:
            for record in log.records(name):
                file.write(separator + json.dumps(record))
                separator = ",\n  "
        file.write("\n ]\n}\n")


def markdown(model: str, tasks: dict[str, dict[str, Any]], *, complete: bool) -> str:
    """Return the table of a model's scores, and what Kyutai has published of the same tasks."""
    rows = []
    for name, figures in tasks.items():
        rows.append(
            [
                TASKS[name].title,
                figures["metric"],
                f"{figures['samples']:,}",
                f"{figures['failed']:,}",
                shown_score(figures),
            ]
        )
    name = model if complete else f"{model} (interrupted)"
    lines = table((name, "metric", "samples", "failed", "score"), rows)
    return "\n".join([*lines, "", *published_table(list(tasks)), ""])


def shown_score(figures: dict[str, Any]) -> str:
    """Return a score as the table has it: MME's with its two parts, OCRBench's out of 1,000 too."""
    if figures["score"] is None:
        return "-"
    if "perception" in figures:
        parts = f"perception {figures['perception']:.1f}, cognition {figures['cognition']:.1f}"
        unpaired = f", {figures['unpaired']} images left out" if figures["unpaired"] else ""
        return f"{figures['score']:.1f} ({parts}{unpaired})"
    if "out_of_1000" in figures:
        return f"{figures['score']:.1f} ({figures['out_of_1000']:.0f} of 1,000)"
    return f"{figures['score']:.1f}"
