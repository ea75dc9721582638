"""What is refused, and with which words; and the undocumented ground of vLLM's we stand on."""

import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config.kv_events import KVEventsConfig
from vllm.multimodal.inputs import PlaceholderRange

from casa_vllm.image_cache_spec import MAX_IMAGES_PER_WINDOW
from casa_vllm.request_images import RequestImages
from vllm_harness import BARE_IMAGE, IMAGE, Engine, Prompt, picture

pytestmark = pytest.mark.vllm


def test_a_mask_may_be_longer_than_its_range():
    attached = PlaceholderRange(offset=3, length=1, is_embed=torch.ones(7, dtype=torch.bool))
    again = pickle.loads(pickle.dumps(attached))
    assert (again.offset, again.length, again.get_num_embeds()) == (3, 1, 7)
    assert again.get_embeds_indices_in_range(0, 1) == (0, 1)


@pytest.mark.parametrize("fusion", ["ca", "insertion"])
def test_wrong_prompts_are_refused_and_the_next_is_answered(fusion, checkpoints, engine):
    vllm = engine(checkpoints("tiny-llama", fusion=fusion))
    image = picture(1)
    for prompt in (
        Prompt(f"{IMAGE} and {IMAGE}", (image,)),
        Prompt("no marker", (image,)),
    ):
        with pytest.raises(ValueError, match="image markers"):
            vllm.add(prompt, 1)
    with pytest.raises(ValueError, match="ratio"):
        vllm.add(Prompt(f"{IMAGE} thin", (picture(2, 5000, 1),)), 1)
    assert len(vllm.ask([Prompt(f"{IMAGE} good", (image,))], 2)[0].tokens) == 2


def test_windows_and_prompts_have_limits(checkpoints, engine):
    vllm = engine(checkpoints("tiny-llama", fusion="ca"))
    many = MAX_IMAGES_PER_WINDOW + 1
    with pytest.raises(ValueError, match="share one window"):
        vllm.add(Prompt(f"x{BARE_IMAGE * many}", (picture(1),) * many), 1)
    with pytest.raises(ValueError, match="no text token"):
        vllm.add(Prompt(BARE_IMAGE, (picture(1),)), 1)
    # The image of refused prompts is not taken for known.
    assert len(vllm.ask([Prompt(f"{IMAGE} good", (picture(1),))], 1)[0].tokens) == 1


def test_a_prompt_whose_images_do_not_fit_in_a_row_ends_alone(checkpoints, engine):
    vllm = engine(checkpoints("tiny-llama", fusion="ca"))
    manager, row_pages = vllm.images, vllm.images.row_pages
    manager.row_pages = 1
    name = vllm.add(Prompt(f"{IMAGE}a{IMAGE}", (picture(1), picture(2))), 2)
    answers = vllm.run()
    manager.row_pages = row_pages
    assert answers[name].tokens == []
    assert len(vllm.ask([Prompt(f"{IMAGE}a{IMAGE}", (picture(1), picture(2)))], 2)[0].tokens) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"disable_hybrid_kv_cache_manager": True}, "disable-hybrid-kv-cache-manager"),
        ({"enable_lora": True}, "LoRA"),
        ({"kv_cache_dtype": "fp8"}, "quantised KV cache"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "KV connectors",
        ),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"enable_mm_embeds": True}, "embeddings in place of images"),
        ({"runner": "pooling"}, "pooling"),
        ({"kv_events_config": KVEventsConfig(enable_kv_cache_events=True, publisher="null")}, "KV-cache events"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_options_that_cannot_work_are_refused(options, words, checkpoints):
    from vllm.engine.arg_utils import EngineArgs

    folder = checkpoints("tiny-llama", fusion="ca")
    arguments = EngineArgs(model=str(folder), dtype="float32", max_model_len=256, **options)
    with pytest.raises(ValueError, match=words):
        arguments.create_engine_config()


def test_one_backend_for_grammars(checkpoints):
    """With vLLM's "auto" the first client's grammar would choose it for all others."""
    from vllm.engine.arg_utils import EngineArgs

    folder = checkpoints("tiny-llama", fusion="insertion")
    config = EngineArgs(model=str(folder), dtype="float32", max_model_len=256).create_engine_config()
    assert config.structured_outputs_config.backend == "xgrammar"


@pytest.mark.parametrize("fusion", ["ca", "insertion"])
@pytest.mark.parametrize(
    ("binding", "options", "executor"),
    [
        ("nobind", {}, "UniProcExecutor"),
        ("nobind", {"distributed_executor_backend": "mp"}, "MultiprocExecutor"),
        ("nobind", {"tensor_parallel_size": 2}, "MultiprocExecutor"),
        ("auto", {}, "MultiprocExecutor"),
    ],
)
def test_a_worker_that_binds_no_threads_needs_no_process(binding, options, executor, fusion, checkpoints, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor.abstract import Executor

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    folder = checkpoints("tiny-llama", fusion=fusion)
    config = EngineArgs(model=str(folder), dtype="float32", max_model_len=256, **options).create_engine_config()
    assert Executor.get_class(config).__name__ == executor


@pytest.mark.parametrize("damage", ["missing", "unexpected", "has shape"])
def test_damaged_checkpoints_are_refused(damage, checkpoints, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoints("tiny-llama", fusion="ca"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.language_model.layers.1.cross_attn.k_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        name = "model.language_model.layers.1.extra.weight"
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=f"(?s)checkpoint does not hold.*{damage}") as error:
        Engine(folder)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("points", "num_tokens", "first_live", "end_before"),
    [
        ([], 5, 0, 0),
        ([4, 9, 9], 0, 0, 0),
        ([4, 9, 9], 4, 0, 0),
        ([4, 9, 9], 8, 0, 1),
        # The next token's window opens at 9: the image before it is dead, and of its own none is computed.
        ([4, 9, 9], 9, 1, 1),
        ([4, 9, 9], 10, 1, 3),
    ],
)
def test_rows_start_with_what_can_still_be_seen(points, num_tokens, first_live, end_before):
    features = [SimpleNamespace(mm_position=PlaceholderRange(offset=point, length=1)) for point in points]
    images = RequestImages.from_features(features)
    assert len(images) == len(points)
    assert (images.first_live(num_tokens), images.end_before(num_tokens)) == (first_live, end_before)
