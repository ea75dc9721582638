"""Each graph and the whole model against eager, in fp32."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from casa_engine.streaming import CasaStream
from casa_export.errors import ExportError
from casa_export.validation import FP32_LIMIT, check, format_table, multi_image_prompt, relative_error, validate
from exports import KINDS, checkpoint, export

# 6, 5, 16, 1, 15 and 4 image tokens: one attention window, several of unequal size, one token high.
GRIDS = torch.tensor([[1, 4, 6], [1, 2, 10], [1, 8, 8], [1, 2, 2], [1, 10, 6], [1, 4, 4]])


def batch(generator):
    """Three rows: three images of which two share a window; padding and an image at the end; an image first."""
    ids = torch.randint(2, 380, (3, 40), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(int(GRIDS.prod(-1).sum()), 1176, generator=generator),
        "image_grid_thw": GRIDS,
        "insertion_points": torch.tensor([[3, 3, 20], [2, 33, -1], [0, -1, -1]]),
    }


@pytest.mark.parametrize(("backbone", "fusion"), KINDS)
def test_every_graph_and_64_greedy_tokens(backbone, fusion):
    comparisons = validate(checkpoint(backbone, fusion), export(backbone, fusion), num_prompts=4)
    assert [c for c in comparisons if not c.passed] == [], format_table(comparisons)
    assert {c.what.split(",")[0] for c in comparisons} >= {"vision", "image KV", "decoder prefill", "decoder decode"}


@torch.inference_mode()
def test_padded_batch_prefill_and_decode(pair):
    eager, exported = pair
    inputs = batch(torch.Generator().manual_seed(2))
    caches = eager.new_cache(), exported.new_cache()
    expected, got = (model(**inputs, past_key_values=cache) for model, cache in zip(pair, caches, strict=True))
    real = inputs["attention_mask"] > 0
    assert relative_error(got.logits[real], expected.logits[real]) < FP32_LIMIT
    for _ in range(3):
        tokens = expected.logits[:, -1].argmax(dim=-1, keepdim=True)
        expected, got = (model(tokens, past_key_values=cache) for model, cache in zip(pair, caches, strict=True))
        assert relative_error(got.logits, expected.logits) < FP32_LIMIT


def test_generate_returns_what_eager_generate_returns(pair):
    eager, exported = pair
    inputs = batch(torch.Generator().manual_seed(3))
    expected = eager.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(exported.generate(**inputs, max_new_tokens=12), expected)


def test_text_alone(pair):
    ids = torch.tensor([[5, 6, 7]])
    eager, exported = (model.generate(ids, max_new_tokens=8, do_sample=False) for model in pair)
    assert torch.equal(eager, exported)


def test_stream_of_frames(pair):
    streams = [CasaStream(model, stop_token_ids=[1]) for model in pair]
    generator = torch.Generator().manual_seed(5)
    patches = torch.randn(int(GRIDS.prod(-1).sum()), 1176, generator=generator).split(GRIDS.prod(-1).tolist())
    for frame in range(len(GRIDS)):
        for stream in streams:
            # An image after the first token of a turn, or at its end.
            stream.feed([5 + frame, 6, 7], patches[frame], GRIDS[frame : frame + 1], [3 if frame % 2 else 1])
            stream.generate(5)
        assert streams[0].token_ids == streams[1].token_ids


def test_pieces_of_a_long_prompt_equal_one_pass(pair):
    """More text than one call takes, and more image tokens: cut at windows."""
    eager, exported = pair
    generator = torch.Generator().manual_seed(4)
    grids = torch.tensor([[1, 16, 12], [1, 16, 12], [1, 16, 12]])  # 48 image tokens each, 128 fit into a call
    inputs = {
        "input_ids": torch.randint(2, 380, (1, 110), generator=generator),
        "pixel_values": torch.randn(int(grids.prod(-1).sum()), 1176, generator=generator),
        "image_grid_thw": grids,
        "insertion_points": torch.tensor([10, 60, 110]),
    }
    with torch.inference_mode():
        assert relative_error(exported(**inputs).logits, eager(**inputs).logits) < FP32_LIMIT
    expected = eager.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(exported.generate(**inputs, max_new_tokens=6), expected)


def with_other_weight(folder, target, name, change):
    """Copy a checkpoint with one of its tensors changed; graphs that were exported from it are then wrong."""
    shutil.copytree(folder, target)
    path = target / "model.safetensors"
    tensors = load_file(path)
    (found,) = [each for each in tensors if each.endswith(name)]
    tensors[found] = change(tensors[found])
    save_file(tensors, path, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("name", "change", "wrong", "right"),
    [
        ("layers.0.mlp.down_proj.weight", lambda weight: 2 * weight, {"decoder prefill", "decoder decode"}, {"vision"}),
        ("layers.0.mlp.down_proj.weight", lambda weight: weight * float("nan"), {"decoder prefill"}, {"vision"}),
        ("merger.mlp.0.weight", lambda weight: 2 * weight, {"vision", "image KV", "decoder prefill"}, set()),
    ],
    ids=["decoder", "NaN", "vision"],
)
def test_validation_finds_a_wrong_graph(tmp_path, name, change, wrong, right):
    other = with_other_weight(checkpoint("qwen", "ca_tv"), tmp_path / "other", name, change)
    comparisons = validate(other, export("qwen", "ca_tv"), num_prompts=0)
    failed = {comparison.what.partition(",")[0] for comparison in comparisons if not comparison.passed}
    assert failed >= wrong and not failed & right, format_table(comparisons)
    with pytest.raises(ExportError, match=r"differ from the eager model in: .*decoder prefill"):
        check(comparisons)


def test_prompts_of_the_validation_read_their_images(exported):
    """Otherwise equal answers would say nothing about images."""
    ids, images = multi_image_prompt(exported, torch.Generator().manual_seed(0))
    points = images["insertion_points"][0].tolist()
    assert len(points) == len(set(points)) == len(images["image_grid_thw"])
    logits = exported(ids, past_key_values=exported.new_cache(), **images).logits
    others = images | {"pixel_values": images["pixel_values"].flip(0)}
    changed = (exported(ids, past_key_values=exported.new_cache(), **others).logits - logits).abs().amax(dim=-1)[0]
    assert min(points) < ids.shape[1] == len(changed)
    assert (changed[: min(points)] == 0).all()
    assert (changed[min(points) :] > 0).all()
