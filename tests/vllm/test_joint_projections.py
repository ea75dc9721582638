"""Both attentions of a layer projected as one: where, that it changes nothing, and that no weight exists twice.

The layers run as on a GPU, Triton's kernels under its interpreter, in a process of their own.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from vllm.config import KernelConfig, LoadConfig
from vllm.model_executor.model_loader import LoadFormats

from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.presets import preset_config
from casa_engine.weight_files import WEIGHTS
from casa_vllm import joint_projections, stacked_linears
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


def engine_config(quant_config=None, load_format="auto", linear_backend="auto"):
    """Return what the rules read of vLLM's configuration."""
    return SimpleNamespace(
        quant_config=quant_config,
        load_config=LoadConfig(load_format=load_format),
        kernel_config=KernelConfig(linear_backend=linear_backend),
    )


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
def test_weights_are_loaded_into_the_joint_tensors(model, tmp_path):
    _, model = model
    text_model = model.model.language_model
    write_random_checkpoint(model.config, tmp_path)
    tensors = {name: 0.1 * torch.randn_like(tensor) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    model.load_weights(tensors.items())
    for index, layer in enumerate(text_model.image_layers):
        prefix = layer.cross_attn.layer_name.removesuffix("cross_attn")
        own, cross = (
            [tensors[f"{prefix}{attention}.{name}_proj.weight"] for name in "qkvo"]
            for attention in ("self_attn", "cross_attn")
        )
        of_text = cross[:1] if text_model.has_queries_apart else cross[:3]
        assert torch.equal(text_model.joint.inputs.weight[index], torch.cat(own[:3] + of_text))
        assert torch.equal(text_model.joint.outputs.weight[index], torch.cat([own[3], cross[3]], dim=1))
    text_model.process_weights_after_loading()
    assert text_model.joint is not None, "loading replaced the parameters"


@interpreted
def test_without_windows_ca_adds_nothing(model):
    _, model = model
    cross = model.model.language_model.image_layers[0].cross_attn
    x, from_self, output = cross.dummy_operands(3, torch.zeros(()))
    cross.attend(x, from_self.normal_(), output.fill_(torch.nan), None)
    assert torch.equal(output, torch.cat([from_self, torch.zeros_like(from_self)], dim=1))


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
    monkeypatch.setattr(joint_projections, "HAS_TRITON", True)
    vllm_config = engine_config(quant_config=object() if is_quantized else None)
    assert joint_projections.joins_attentions(preset_config("tiny-llama", **fields), vllm_config) is expected


@pytest.mark.parametrize(
    ("load_format", "expected"),
    [
        ("auto", True),
        ("runai_streamer", True),
        ("sharded_state", False),  # flattens each parameter: columns of a tensor cannot be
        ("runai_streamer_sharded", False),
        ("tensorizer", False),  # replaces parameters without telling the model
        ("ipc_cache", False),
        ("somebody-elses", False),
    ],
)
def test_weights_are_stacked_where_the_loader_keeps_them(load_format, expected, monkeypatch):
    monkeypatch.setattr(joint_projections, "HAS_TRITON", True)
    vllm_config = engine_config(load_format=load_format)
    assert stacked_linears.can_stack_weights(vllm_config) is expected
    assert joint_projections.joins_attentions(preset_config("tiny-llama", fusion="ca"), vllm_config) is expected


def test_every_load_format_of_vllm_is_one_of_which_this_is_known():
    formats = set(get_args(LoadFormats))
    others = {"modelexpress", "runai_streamer_sharded", "sharded_state", "tensorizer", "ipc_cache"}
    assert formats >= stacked_linears.STACKABLE_LOAD_FORMATS
    assert formats - stacked_linears.STACKABLE_LOAD_FORMATS <= others


def test_products_that_an_option_names_are_not_replaced(monkeypatch):
    assert not stacked_linears.can_stack_weights(engine_config(linear_backend="flashinfer_cutlass"))
    monkeypatch.setattr(stacked_linears, "envs", SimpleNamespace(VLLM_BATCH_INVARIANT=True))
    assert not stacked_linears.can_stack_weights(engine_config())


@pytest.mark.parametrize(("is_quantized", "expected"), [(False, True), (True, False)])
def test_attentions_are_summed_before_a_product_without_scales(is_quantized, expected):
    config = preset_config("tiny-llama", fusion="ca", ca_weights="shared")
    vllm_config = engine_config(quant_config=object() if is_quantized else None)
    assert joint_projections.sums_attentions(config, vllm_config) is expected


def test_a_bias_of_the_output_keeps_them_apart(monkeypatch):
    monkeypatch.setattr(joint_projections, "HAS_TRITON", True)
    config = preset_config("tiny-llama", fusion="ca")
    config.text_config.attention_bias = True
    assert not joint_projections.joins_attentions(config, engine_config())
