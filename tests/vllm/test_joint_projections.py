"""Both attentions of a layer projected as one: where, that it changes nothing, and that no weight exists twice.

The layers run as on a GPU, Triton's kernels under its interpreter, in a process of their own.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from casa_engine.presets import preset_config
from interpreter_process import check_under_interpreter

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MODELS = {
    "ca": ("tiny-llama", {"fusion": "ca"}),
    "ca_tv": ("tiny-qwen", {"fusion": "ca_tv"}),  # with biases
    "some-layers": ("tiny-qwen", {"fusion": "ca_tv", "ca_layers": [0, 2]}),
    "norms": ("tiny-qwen3", {"fusion": "ca"}),
}
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in the process that the first test starts")
pytestmark = pytest.mark.vllm


@pytest.mark.skipif(IS_INTERPRETED, reason="this is that process")
def test_under_the_interpreter():
    check_under_interpreter(__file__)


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """vLLM's model as on a GPU, with keys and values in its pages."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import kernel_counts

    preset, fields = MODELS[request.param]
    model = kernel_counts.build(preset, 3, fields, tmp_path_factory.mktemp("model"))
    for layer in kernel_counts.cross_attention_layers(model):
        for cache in filter(None, (layer, layer.text_cache)):
            cache.kv_cache.normal_()
    return kernel_counts, model


@interpreted
def test_no_weight_exists_twice(model):
    _, model = model
    text_model = model.model.language_model
    parameters = list(text_model.parameters())
    stacks = [text_model.joint.inputs.weight, text_model.joint.outputs.weight]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in [*parameters, *stacks]
    }
    assert sum(storages.values()) == sum(parameter.nbytes for parameter in parameters)


@interpreted
def test_weights_that_are_replaced_are_projected_apart_with_the_same_result(model):
    """As vLLM replaces them on a CPU, and as a method of quantisation may."""
    kernel_counts, model = model
    text_model = model.model.language_model
    torch.manual_seed(0)
    with kernel_counts.decoding(model) as attend, torch.no_grad():
        joint = attend()
        text_model.process_weights_after_loading()
        assert text_model.joint is not None, "nothing was replaced"
        o_proj = text_model.layers[0].self_attn.o_proj
        o_proj.weight = torch.nn.Parameter(o_proj.weight.clone(), requires_grad=False)
        text_model.process_weights_after_loading()
        assert text_model.joint is None and text_model.stacked_images is None
        apart = attend()
    assert joint.abs().max() > 0.1
    torch.testing.assert_close(joint, apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "is_quantized", "expected"),
    [
        ({"fusion": "ca"}, False, True),
        ({"fusion": "ca_tv", "ca_layers": [1]}, False, True),
        ({"fusion": "ca"}, True, False),
        ({"fusion": "ca", "ca_weights": "shared"}, False, False),
        ({"fusion": "ca", "ca_placement": "replace", "ca_layers": [1]}, False, False),
        ({"fusion": "ca", "ca_layers": []}, False, False),
        ({"fusion": "insertion"}, False, False),
    ],
)
def test_where_attentions_are_joined(fields, is_quantized, expected, monkeypatch):
    from casa_vllm import joint_projections

    monkeypatch.setattr(joint_projections, "HAS_TRITON", True)
    vllm_config = SimpleNamespace(quant_config=object() if is_quantized else None)
    assert joint_projections.joins_attentions(preset_config("tiny-llama", **fields), vllm_config) is expected


def test_a_bias_of_the_output_keeps_them_apart(monkeypatch):
    from casa_vllm import joint_projections

    monkeypatch.setattr(joint_projections, "HAS_TRITON", True)
    config = preset_config("tiny-llama", fusion="ca")
    config.text_config.attention_bias = True
    assert not joint_projections.joins_attentions(config, SimpleNamespace(quant_config=None))
