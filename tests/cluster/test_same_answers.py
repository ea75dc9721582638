"""The cluster answers as `casa-serve` does: one table of requests, good and bad, sent to both.

What differs on purpose is in `as_cluster`; docs/cluster.md says the same to clients, with the reasons.
"""

import httpx
import pytest

from casa_serving.cluster.ingress import ONE_ENGINE_ONLY
from casa_serving.cluster.setting_names import name_keys
from request_table import all_cases, comparable
from serving_process import casa_serve

# Slow: two real servers, and the whole table to each, take minutes.
pytestmark = [pytest.mark.vllm, pytest.mark.slow]
# By the case's name: the header that the cluster leaves out, since its ingress answers and not a replica.
WITHOUT_VARY = {"health", "ping", "ping by post", "head of health", "page", "head of the page", "a file of the page"}
WITHOUT_VARY |= {"no file of the page", "the model of the page"}
# A large body, or a good part of the context, on a machine that does other things.
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A client of `casa-serve`, started as the replicas are."""
    with casa_serve(tmp_path_factory.mktemp("alone") / "log.txt", "--enforce-eager") as server:
        with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
            yield client


@pytest.fixture(scope="module")
def clustered(cluster):
    """A client of the cluster."""
    with httpx.Client(base_url=cluster.url, timeout=TIMEOUT_S) as client:
        yield client


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_both_answer_alike(alone, clustered, case):
    expected, got = comparable(case.send(alone)), comparable(case.send(clustered))
    if case.status:
        assert expected["status"] == case.status, expected
    assert got == as_cluster(case, expected)


def as_cluster(case, expected):
    """What the cluster must answer, of what casa-serve does: the same but for what is meant."""
    headers, body = expected["headers"], expected["body"]
    if case.name in WITHOUT_VARY:
        headers = {name: value for name, value in headers.items() if name != "vary"}
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        body = {"error": {**body["error"], "message": name_keys(body["error"]["message"])}}
    return {**expected, "headers": headers, "body": body}


@pytest.mark.parametrize("path", ONE_ENGINE_ONLY)
def test_what_only_one_engine_has_is_said_to_be_elsewhere(alone, clustered, path):
    assert alone.get(path).status_code == 200
    answer = clustered.get(path)
    assert answer.status_code == 404
    assert "docs/cluster.md" in answer.json()["error"]["message"]
