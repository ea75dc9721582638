"""vLLM's vision encoder, which GPUs run, is the eager model's: eagerly, and from the buffers of its CUDA graphs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from casa_vllm import config_hook

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).parents[1] / "support" / "vision_encoders.py"


@pytest.mark.parametrize(("preset", "image_norm"), [("tiny-qwen", "false"), ("tiny-llama", "true")])
def test_it_is_the_eager_models(preset, image_norm):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), preset, image_norm],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    # 17 roundings of float32; measured are up to 9.
    assert result["eager"] <= 2e-6 * result["scale"], result
    assert result["graph"] <= 2e-6 * result["scale"], result
    # One image has more tokens than the largest graph.
    assert (result["in_graphs"], result["beyond"]) == (6, 1)


def test_a_gpu_without_torchvision_is_one_sentence(monkeypatch):
    monkeypatch.setattr(config_hook.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(config_hook, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="torchvision is not installed; expected it on a machine with a GPU"):
        config_hook._require_fast_encoder()
    monkeypatch.setattr(config_hook, "find_spec", importlib.util.find_spec)
    monkeypatch.setattr(config_hook.current_platform, "is_cpu", lambda: True)
    config_hook._require_fast_encoder()
