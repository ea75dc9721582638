"""The example that needs a cluster, against the tests' cluster."""

import re

import pytest

from example_programs import run_example

pytestmark = pytest.mark.vllm


def test_cluster_sessions(cluster, tmp_path):
    lines = run_example("cluster_sessions.py", "--users", "3", "--base-url", f"{cluster.url}/v1", folder=tmp_path)
    assert sorted(line.partition(":")[0] for line in lines) == ["user-0", "user-1", "user-2"]
    for line in lines:
        assert "Read the digits. 0 7 0 9 (new, on " in line
        first, second = re.findall(r"\((new|kept), on (\S+)\)", line)
        assert (first[0], second[0]) == ("new", "kept")
        assert first[1] == second[1]
