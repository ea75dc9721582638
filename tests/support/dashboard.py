"""The Grafana board in deploy/, and the names of the metrics that its queries ask for."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from promql_parser import Expr, VectorSelector, parse, walk

BOARD = Path(__file__).parents[2] / "deploy" / "grafana.json"


def board() -> dict[str, Any]:
    """Returns the board as Grafana reads it."""
    return json.loads(BOARD.read_text())


def panels() -> list[dict[str, Any]]:
    """Returns the panels that draw something; rows are only headings."""
    return [panel for panel in board()["panels"] if panel["type"] != "row"]


def nodes(query: str) -> list[Expr]:
    """Returns a PromQL expression and every expression inside it.

    Raises:
        ValueError: It is not PromQL.
    """
    found: list[Expr] = []
    # Grafana puts a duration there. Its other variables stand inside strings.
    walk(parse(query.replace("$__rate_interval", "5m")), found.append)
    return found


def metric_names(query: str) -> set[str]:
    """Returns the names of the metrics in a PromQL expression."""
    return {node.name for node in nodes(query) if isinstance(node, VectorSelector)}


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
