"""What deploy/ gives Prometheus and Grafana: queries that can be parsed, of metrics that are exported.

Whether a running server and a running cluster export them: test_endpoint.py in tests/serving, test_cluster.py here.
"""

import itertools
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge
from promql_parser import Call

from casa_serving.cluster.replica_metrics import casa_samples
from casa_serving.live.metrics import LiveMetrics
from casa_vllm.metric_names import COUNTERS, GAUGES, LAST_STEP, PREFIX
from monitoring import (
    CLUSTER_BOARD,
    SERVER_BOARD,
    alert_metrics,
    alert_rules,
    board,
    board_metrics,
    metric_names,
    nodes,
    panels,
    queries,
)

ROOT = Path(__file__).parents[2]
BOARDS = pytest.mark.parametrize(
    ("name", "variables"),
    [(SERVER_BOARD, ["job", "instance"]), (CLUSTER_BOARD, ["application", "deployment", "replica"])],
)
ALL_BOARDS = pytest.mark.parametrize("name", [SERVER_BOARD, CLUSTER_BOARD])
GROUPS = ("casa-serve", "casa-cluster")


def rules(group):
    """Return the expressions of a group's alerts."""
    return [rule["expr"] for rule in alert_rules(group)]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("up", {"up"}),
        ('sum by (code) (rate(a_total{b=~"$c", d!="e{f}"}[$__rate_interval]))', {"a_total"}),
        ("histogram_quantile(0.95, sum by (le) (rate(x_bucket[5m])))", {"x_bucket"}),
        ("(sum(rate(hit[1m])) or vector(0)) / on (replica) group_left (name) all:hits:sum", {"hit", "all:hits:sum"}),
        ("max_over_time(load[1h:1m] offset 5m) > bool 1e3 unless idle", {"load", "idle"}),
        ("sum(a) without (b) + -Inf", {"a"}),
    ],
)
def test_names_are_found_in_queries(query, names):
    assert metric_names(query) == names


@pytest.mark.parametrize("query", ["sum(", "rate(a_total)", "rate(a_total[5m]", "a b", "sum by (a)", "averagee(a)"])
def test_what_is_no_query_is_found_out(query):
    with pytest.raises(ValueError):
        metric_names(query)


def test_every_metric_of_the_engine_is_documented():
    counters = [f"{name}_total" for name in COUNTERS]
    written = set(re.findall(r"^\| `casa:(\w+)`", (ROOT / "docs" / "deploy.md").read_text(), re.MULTILINE))
    assert written == {*GAUGES, *counters, LAST_STEP}


@BOARDS
def test_the_board_has_what_grafana_needs(name, variables):
    shown = board(name)
    assert shown["schemaVersion"] >= 39
    assert {"title", "uid", "panels", "templating", "time", "refresh"} <= shown.keys()
    assert [variable["name"] for variable in shown["templating"]["list"]] == ["datasource", *variables]
    numbers = [panel["id"] for panel in shown["panels"]]
    assert len(numbers) == len(set(numbers))
    titles = [panel["title"] for panel in shown["panels"]]
    assert len(titles) == len(set(titles))


@ALL_BOARDS
def test_panels_do_not_overlap(name):
    taken = set()
    for panel in board(name)["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] and place["x"] + place["w"] <= 24
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & taken, panel["title"]
        taken |= cells


@ALL_BOARDS
def test_every_panel_asks_the_chosen_source_and_says_what_it_shows(name):
    shown = panels(name)
    assert len(shown) > 10
    for panel in shown:
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert metric_names(target["expr"])
        letters = [target["refId"] for target in panel["targets"]]
        assert len(letters) == len(set(letters))


@ALL_BOARDS
def test_queries_use_only_variables_that_exist(name):
    known = {variable["name"] for variable in board(name)["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$(\w+)", "\n".join(queries(name)))) <= known


@pytest.mark.parametrize(
    "asked",
    [
        lambda: queries(SERVER_BOARD),
        lambda: queries(CLUSTER_BOARD),
        lambda: rules("casa-serve"),
        lambda: rules("casa-cluster"),
    ],
    ids=["server", "cluster", "server's alerts", "cluster's alerts"],
)
def test_quantiles_are_of_buckets_and_rates_of_counters(asked):
    found = list(asked())
    assert len(found) > 2
    for query in found:
        assert ("histogram_quantile" in query) == any("_bucket" in name for name in metric_names(query))
        for call in nodes(query):
            if isinstance(call, Call) and call.func.name in {"rate", "irate", "increase"}:
                (counter,) = metric_names(str(call.args[0]))
                assert counter.endswith(("_total", "_bucket", "_sum", "_count")), counter


def test_names_of_our_own_metrics_are_those_that_are_exported():
    registry = CollectorRegistry()
    live = LiveMetrics(["m", "0"], registry)
    live.delay.observe(0.1)
    for name in GAUGES:
        Gauge(PREFIX + name, "", registry=registry)
    # Ray puts its name in front, and `_total` behind the router's counters.
    exported = {f"ray_{name}" for name in casa_samples(registry)}
    exported |= {f"ray_casa_{name}_total" for name in COUNTERS}
    router = (ROOT / "serving/casa_serving/cluster/router.py").read_text()
    exported |= {f"ray_{name}_total" for name in re.findall(r'"(casa_routing_\w+)"', router)}
    asked = board_metrics(CLUSTER_BOARD) | alert_metrics("casa-cluster")
    ours = {name for name in asked if name.startswith("ray_casa_")}
    assert ours
    assert ours <= exported


@pytest.mark.parametrize("group", GROUPS)
def test_every_alert_says_what_is_wrong_and_what_to_do(group):
    found = alert_rules(group)
    assert len(found) > 2
    for rule in found:
        assert rule.keys() - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert re.fullmatch(r"Casa[A-Z]\w+", rule["alert"])
        assert rule["labels"].keys() == {"severity"} and rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "description"}
        assert metric_names(rule["expr"])


def test_alerts_have_names_of_their_own():
    names = [rule["alert"] for group in GROUPS for rule in alert_rules(group)]
    assert len(names) == len(set(names))
