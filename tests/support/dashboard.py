"""The Grafana board in deploy/, and the names of the metrics that its queries ask for."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BOARD = Path(__file__).parents[2] / "deploy" / "grafana.json"

# In this order: what is inside quotes, braces and brackets can look like anything else.
NO_METRICS = (
    re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'|`[^`]*`'),
    re.compile(r"{[^{}]*}"),
    re.compile(r"\[[^][]*\]"),
    re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)"),
    # Numbers with their exponents, and durations behind `offset`.
    re.compile(r"(?<![\w:])\d[\w.]*"),
)
# A name that opens a bracket is a function.
NAME = re.compile(r"[a-zA-Z_:][\w:]*(?!\s*\(|[\w:])")
WORDS = {"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring", "group_left", "group_right"}
WORDS |= {"inf", "nan", "sum", "min", "max", "avg", "count", "atan2"}


def board() -> dict[str, Any]:
    """Returns the board as Grafana reads it."""
    return json.loads(BOARD.read_text())


def panels() -> list[dict[str, Any]]:
    """Returns the panels that draw something; rows are only headings."""
    return [panel for panel in board()["panels"] if panel["type"] != "row"]


def metric_names(query: str) -> set[str]:
    """Returns the names of the metrics in a PromQL expression."""
    for pattern in NO_METRICS:
        query = pattern.sub(" ", query)
    return {name for name in NAME.findall(query) if name.lower() not in WORDS}


def queries() -> Iterator[str]:
    """Yields every PromQL expression of the board: those of the panels, and what the variables list the labels of."""
    for panel in panels():
        yield from (target["expr"] for target in panel["targets"])
    for variable in board()["templating"]["list"]:
        if variable["type"] == "query":
            yield re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]["query"]).group(1)


def dashboard_metrics() -> set[str]:
    """Returns every name of a metric that the board asks for, as it stands at the start of a line at the endpoint."""
    return set().union(*map(metric_names, queries()))
