"""What deploy/ gives Prometheus and Grafana, and the names of the metrics that its queries ask for."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from promql_parser import Expr, VectorSelector, parse, walk

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVER_BOARD, CLUSTER_BOARD = "grafana-server.json", "grafana.json"


def board(name: str) -> dict[str, Any]:
    """Return a board as Grafana reads it."""
    return json.loads((DEPLOY / name).read_text())


def panels(name: str) -> list[dict[str, Any]]:
    """Return a board's panels that draw something; rows are only headings."""
    return [panel for panel in board(name)["panels"] if panel["type"] != "row"]


def nodes(query: str) -> list[Expr]:
    """Return a PromQL expression and every expression inside it.

    Raises:
        ValueError: It is not PromQL.
    """
    found: list[Expr] = []
    # Grafana puts a duration there. Its other variables stand inside strings.
    walk(parse(query.replace("$__rate_interval", "5m")), found.append)
    return found


def metric_names(query: str) -> set[str]:
    """Return the names of the metrics in a PromQL expression."""
    return {node.name for node in nodes(query) if isinstance(node, VectorSelector)}


def queries(name: str) -> Iterator[str]:
    """Yield every PromQL expression of a board: those of the panels, and what the variables list the labels of."""
    for panel in panels(name):
        yield from (target["expr"] for target in panel["targets"])
    for variable in board(name)["templating"]["list"]:
        if variable["type"] == "query":
            yield re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]["query"]).group(1)


def board_metrics(name: str) -> set[str]:
    """Return every name of a metric that a board asks for, as it stands at the start of a line at the endpoint."""
    return set().union(*map(metric_names, queries(name)))


def alert_rules(group: str) -> list[dict[str, Any]]:
    """Return the alert rules of a group."""
    (found,) = (
        part for part in yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"] if part["name"] == group
    )
    return found["rules"]


def alert_metrics(group: str) -> set[str]:
    """Return every name of a metric that a group of alert rules asks for."""
    return set().union(*(metric_names(rule["expr"]) for rule in alert_rules(group)))
