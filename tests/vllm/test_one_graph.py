"""The decoder is one graph for torch.compile, and vLLM splits it at its attentions alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "one_graph.py"
MODELS = [
    ("tiny-llama", "ca", "own"),
    pytest.param("tiny-llama", "ca", "shared", marks=pytest.mark.slow),
    pytest.param("tiny-qwen", "ca_tv", "own", marks=pytest.mark.slow),
    ("tiny-qwen", "ca_tv", "shared"),
]


@pytest.mark.vllm
@pytest.mark.parametrize(("preset", "fusion", "weights"), MODELS)
def test_one_graph_that_splits_at_attentions(preset, fusion, weights):
    compiles = {"TORCH_COMPILE_DISABLE": "0", "TORCHDYNAMO_DISABLE": "0"}  # whatever an engine before it has set
    environment = {**os.environ, **compiles, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), preset, fusion, weights],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # Two attentions in each of three layers are pieces of their own, with one before, between and after them.
    assert done.stdout.split()[-2:] == ["pieces", "13"], done.stdout
