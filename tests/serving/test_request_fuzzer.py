"""Malformed requests of every kind, to every path of a real server."""

import asyncio
import json

import pytest

from request_fuzzer import Fuzzer, fault_of, fuzz


@pytest.mark.vllm
@pytest.mark.parametrize("seed", [1, 2])
def test_malformed_requests_are_refused_and_nothing_else_happens(server, good_request, seed):
    before = good_request()
    faults = asyncio.run(fuzz(server.url, cases=300, seed=seed))
    assert not faults, "\n".join(faults)
    assert good_request() == before


def test_the_same_seed_gives_the_same_cases():
    schema = {"properties": {"n": {"type": "integer"}, "stop": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}
    openapi = {"paths": {"/x": {"post": {"requestBody": {"content": {"application/json": {"schema": schema}}}}}}}
    cases = [list(Fuzzer(openapi, seed).cases(50)) for seed in (1, 1, 2)]
    assert cases[0] == cases[1] != cases[2]
    assert len({case.body for case in cases[0]}) > 20


@pytest.mark.parametrize(
    ("status", "body", "fault"),
    [
        (200, b"anything", None),
        (400, json.dumps({"error": {"message": "m", "type": "t", "param": None, "code": 400}}).encode(), None),
        (500, b"{}", "status 500"),
        (400, b'{"detail": "m"}', "not OpenAI's shape"),
        (400, b'{"error": "m"}', "not OpenAI's shape"),
        (400, json.dumps({"error": {"message": "m", "type": "t", "param": None, "code": 404}}).encode(), "shape"),
        (400, b"[" + b" " * 70_000 + b"]", "error of 70002 bytes"),
    ],
)
def test_what_a_fault_is(status, body, fault):
    found = fault_of(status, body)
    assert found == fault or (fault and fault in found)
