"""What of a GPU's memory text gets: no pages are set apart for images, and what steps allocate is counted before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, get_kv_cache_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec

from casa_engine.checkpoints import default_processor
from casa_engine.presets import preset_config
from casa_vllm.api import PageCosts
from casa_vllm.image_cache_spec import ImageCacheSpec, ImageLimits
from casa_vllm.image_manager import register_image_cache
from casa_vllm.kv_capacity import report_capacity, text_token_capacity
from scheduler_simulation import BLOCK_SIZE, Chunk, Simulation

pytestmark = pytest.mark.vllm
SLOW = ("2B-ca-shared", "qwen3-ca_tv")
SUPPORT = Path(__file__).parents[1] / "support"


def kv_cache_of(preset, memory_gib, folder):
    """vLLM's configuration of the preset with random weights, and its KV cache in so much memory of a GPU."""
    config = preset_config(preset, architectures=["CasaForConditionalGeneration"])
    config.save_pretrained(folder)
    default_processor(config).save_pretrained(folder)
    options = {"max_model_len": 2048, "max_num_batched_tokens": 8192, "load_format": "dummy"}
    vllm_config = EngineArgs(model=str(folder), dtype="bfloat16", **options).create_engine_config()
    # As on a GPU: the platform of CPUs changes the first, the engine sets the second.
    vllm_config.scheduler_config.async_scheduling = True
    vllm_config.cache_config.kv_cache_layout = "LBNHC"
    register_image_cache()
    text = config.text_config
    size = {
        "block_size": 16,
        "num_kv_heads": text.num_key_value_heads,
        "head_size": config.head_dim,
        "dtype": torch.bfloat16,
    }
    limits = ImageLimits(step_tokens=8192, max_prompt_tokens=262_144, max_prompt_images=1024)
    specs = {}
    for layer in range(text.num_hidden_layers):
        if config.has_sa(layer):
            specs[f"layers.{layer}.self_attn"] = FullAttentionSpec(**size)
        if config.has_ca(layer):
            specs[f"layers.{layer}.cross_attn"] = ImageCacheSpec(**size, **vars(limits))
            if config.sees_window_text:
                specs[f"layers.{layer}.cross_attn.text"] = FullAttentionSpec(**size)
    return vllm_config, get_kv_cache_configs(vllm_config, [specs], [memory_gib << 30])[0]


@pytest.mark.parametrize(
    ("preset", "bytes_per_token", "text_tokens", "of_vllm"),
    [
        ("CASA-Helium1-VL-2B", 28 * 2 * 8 * 128 * 2, 1_142_176, 85_397),
        ("CASA-Qwen2_5-VL-3B-LiveCC", 2 * 36 * 2 * 2 * 128 * 2, 1_776_744, 247_200),
    ],
)
def test_text_capacity_of_122_gib(preset, bytes_per_token, text_tokens, of_vllm, tmp_path):
    vllm_config, kv_cache = kv_cache_of(preset, 122, tmp_path)
    fits = (122 << 30) // bytes_per_token
    num_tokens = text_token_capacity(kv_cache)
    assert num_tokens == text_tokens
    assert 0.999 * fits < num_tokens <= fits
    # vLLM's own figure, which counts the most images in flight for every request; another version may round otherwise.
    assert get_kv_cache_capacity(vllm_config, kv_cache)[0] == pytest.approx(of_vllm, rel=0.01)
    report_capacity(vllm_config, kv_cache)
    assert vllm_config.cache_config.kv_cache_size_tokens == num_tokens
    (pages,) = {
        group.kv_cache_spec.max_pages_in_use(vllm_config.max_concurrent_batches)
        for group in kv_cache.kv_cache_groups
        if isinstance(group.kv_cache_spec, ImageCacheSpec)
    }
    assert pages == 1584, "what a start needs for one request's images, two steps in flight"


@pytest.mark.parametrize("preset", ["CASA-Helium1-VL-2B", "CASA-Qwen2_5-VL-3B-LiveCC"])
def test_a_session_weighs_its_pages_in_the_pool(preset, tmp_path):
    vllm_config, kv_cache = kv_cache_of(preset, 4, tmp_path)
    vllm_config.cache_config.block_size = 16
    config = preset_config(preset)
    costs = PageCosts.of_engine(config, vllm_config)
    # Groups take their pages from one pool.
    assert kv_cache.num_blocks == (4 << 30) // costs.page_bytes
    pages = 3 * costs.text_groups + costs.image_pages(100)
    assert costs.session_bytes(33, 100) == pages * costs.page_bytes
    text = config.text_config
    token_bytes = text.num_hidden_layers * 2 * text.num_key_value_heads * config.head_dim * 2
    assert costs.insertion_bytes(100) == 100 * token_bytes


@pytest.mark.parametrize("num_text_groups", [1, 2])
def test_text_alone_takes_every_page(num_text_groups, checkpoints):
    simulation = Simulation(
        checkpoints("tiny-llama", fusion="ca"),
        num_text_groups,
        extra_blocks=101,
        max_num_seqs=256,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
    )
    expected = simulation.num_free_blocks // num_text_groups
    assert text_token_capacity(simulation.scheduler.kv_cache_config) == (
        simulation.num_free_blocks * BLOCK_SIZE // num_text_groups
    )
    clients = [simulation.open([Chunk([1] * BLOCK_SIZE)]) for _ in range(expected + 3)]
    output = simulation.scheduler.schedule()
    assert len(output.num_scheduled_tokens) == expected, "each has one page of every text group"
    assert simulation.free_blocks() < num_text_groups
    assert len(clients) - expected == len(simulation.scheduler.waiting)


@pytest.mark.parametrize("model", ["2B-ca", "3B-ca_tv", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_profiling_allocates_what_steps_do(model):
    pytest.importorskip("triton", reason="Triton has no build for this machine")
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "profiled_memory.py"), model],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    peaks = json.loads(done.stdout.splitlines()[-1])
    # Beside the result itself, which the caller has in both cases; slots and addresses of pages are a few bytes.
    assert peaks["profile_images"] >= 0.99 * peaks["write_images"], peaks
    assert peaks["profile_text"] >= 0.99 * peaks["attend_text"], peaks
