"""vLLM's vision encoder, which GPUs run, is the eager model's: eagerly, and from the buffers of its CUDA graphs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.compilation.decorators import should_torch_compile_mm_encoder
from vllm.config import CompilationConfig, VllmConfig

from casa_vllm import config_hook
from casa_vllm.encoder_graphs import graph_tokens

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


# Width and height as clients send them: squares of live sessions, and pictures of usual cameras and screens.
SQUARES = ((448, 448), (896, 896))
OTHERS = ((336, 336), (672, 672), (640, 360), (640, 480), (854, 480), (1280, 720), (1920, 1080))


def lost_shares(size, graphs):
    """Of each number of pictures that fit into a graph: the share of a replay that is padding."""
    tokens = round(size[0] / 28) * round(size[1] / 28)
    counts = [tokens * pictures for pictures in range(1, graphs[-1] // tokens + 1)]
    return [1 - count / min(graph for graph in graphs if graph >= count) for count in counts]


def test_graphs_fit_usual_pictures():
    graphs = graph_tokens(8192)
    assert graphs == sorted(set(graphs)) and len(graphs) == 20 and (graphs[0], graphs[-1]) == (64, 4096)
    squares = [lost_shares(size, graphs) for size in SQUARES]
    assert squares[0][:8] == [0.0] * 8 and squares[1] == [0.0] * 4, "frames of live sessions fit exactly"
    lost = [share for shares in squares for share in shares]
    lost += [share for size in OTHERS for share in lost_shares(size, graphs)]
    assert max(lost) <= 0.25 and sum(lost) / len(lost) <= 0.08
    # vLLM's own choice, for comparison.
    powers = [64 << n for n in range(7)]
    assert max(share for size in SQUARES + OTHERS for share in lost_shares(size, powers)) > 0.45


@pytest.mark.parametrize(("largest", "expected"), [(50, [50]), (200, [64, 128, 192, 200]), (64, [64])])
def test_no_graph_is_larger_than_a_step(largest, expected):
    assert graph_tokens(largest) == expected


@pytest.mark.parametrize(
    ("given", "items", "expected"),
    [([], 0, graph_tokens(200)), ([], 100, [128, 192, 200]), ([], 300, []), ([100], 0, [100])],
)
def test_sizes_of_graphs_are_set_unless_somebody_chose_them(given, items, expected):
    compilation = SimpleNamespace(
        cudagraph_mm_encoder=True,
        encoder_cudagraph_token_budgets=given,
        encoder_cudagraph_max_vision_items_per_batch=items,
    )
    scheduler = SimpleNamespace(max_num_encoder_input_tokens=200)
    config_hook._set_vision_encoder(SimpleNamespace(compilation_config=compilation, scheduler_config=scheduler))
    assert compilation.encoder_cudagraph_token_budgets == expected


@pytest.mark.parametrize("graphs", [False, True])
def test_an_encoder_without_graphs_is_compiled(graphs):
    """By vLLM's own option, which its encoder asks when it is made."""
    config = VllmConfig(compilation_config=CompilationConfig(cudagraph_mm_encoder=graphs))
    config_hook._set_vision_encoder(config)
    assert should_torch_compile_mm_encoder(config) is not graphs
