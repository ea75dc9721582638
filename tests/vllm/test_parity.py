"""vLLM's tokens and logprobs against the eager model's, for every fusion, placement and backbone."""

import pytest

from vllm_harness import BARE_IMAGE, IMAGE, Prompt, assert_same, picture

NUM_TOKENS = 6
LONG = "The quick brown fox jumps over the lazy dog again. "

PROMPTS = {
    "no-image": Prompt("hello there, world"),
    "image-first": Prompt(f"{BARE_IMAGE}what is this?", (picture(1),)),
    "image-last": Prompt(f"look: {BARE_IMAGE}", (picture(2, 84, 56),)),
    "text-before-the-first-image": Prompt(f"{LONG}{IMAGE} and?", (picture(3),)),
    "adjacent-images": Prompt(f"two {BARE_IMAGE}{BARE_IMAGE} of them", (picture(4), picture(5, 28, 28))),
    "six-images-interleaved": Prompt(
        "".join(f"{name} {IMAGE} then " for name in "abcdef"),
        tuple(picture(10 + index) for index in range(6)),
    ),
    "one-token-window": Prompt(f"x{BARE_IMAGE}y{BARE_IMAGE}z w", (picture(6), picture(7))),
    "odd-sizes": Prompt(
        f"wide {IMAGE} tall {IMAGE} tiny {IMAGE}.",
        (picture(8, 301, 29), picture(9, 30, 211), picture(20, 28, 28)),
    ),
    "several-pages": Prompt(f"big {IMAGE} end", (picture(21, 280, 224),)),
    "long-text-in-the-window": Prompt(f"see {IMAGE}{LONG * 4}", (picture(22),)),
}

MODELS = {
    "llama-ca": ("tiny-llama", {"fusion": "ca"}),
    "llama-ca_tv": ("tiny-llama", {"fusion": "ca_tv"}),
    "llama-insertion": ("tiny-llama", {"fusion": "insertion"}),
    "qwen-ca": ("tiny-qwen", {"fusion": "ca"}),
    "qwen-ca_tv-grid": ("tiny-qwen", {"fusion": "ca_tv"}),
    "qwen-insertion": ("tiny-qwen", {"fusion": "insertion"}),
    "qwen3-ca": ("tiny-qwen3", {"fusion": "ca"}),
    "qwen3-ca_tv": ("tiny-qwen3", {"fusion": "ca_tv"}),
    "qwen3-ca_tv-shared": ("tiny-qwen3", {"fusion": "ca_tv", "ca_weights": "shared"}),
    "llama-ca-shared": ("tiny-llama", {"fusion": "ca", "ca_weights": "shared"}),
    "qwen-ca_tv-shared-before": (
        "tiny-qwen",
        {"fusion": "ca_tv", "ca_weights": "shared", "image_position_offset": -1},
    ),
    "llama-ca-some-layers-raw-image_norm": (
        "tiny-llama",
        {"fusion": "ca", "ca_layers": [1], "normalize_image_tokens": False, "image_norm": True},
    ),
    "qwen-ca_tv-replacing-one": (
        "tiny-qwen",
        {"fusion": "ca_tv", "ca_placement": "replace", "ca_layers": [1]},
    ),
    "llama-ca-replacing-two": (
        "tiny-llama",
        {"fusion": "ca", "ca_placement": "replace", "ca_layers": [0, 2]},
    ),
}


@pytest.mark.vllm
@pytest.mark.parametrize("model", MODELS)
def test_all_prompts_in_one_batch(model, checkpoints, eager, engine):
    preset, fields = MODELS[model]
    folder = checkpoints(preset, **fields)
    prompts = list(PROMPTS.values())
    answers = engine(folder).ask(prompts, NUM_TOKENS)
    assert_same(answers, [eager(folder)(prompt, NUM_TOKENS) for prompt in prompts])


@pytest.mark.vllm
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02), ("float16", 0.002)])
def test_in_16_bits(dtype, tolerance, checkpoints, eager, engine):
    """As on GPUs: the engine is built while PyTorch's default is this type; pixels stay float32."""
    folder = checkpoints("tiny-llama", fusion="ca_tv")
    prompts = [PROMPTS["image-first"], PROMPTS["six-images-interleaved"]]
    answers = engine(folder, dtype=dtype).ask(prompts, 1)
    for answer, expected in zip(answers, (eager(folder)(prompt, 1) for prompt in prompts), strict=True):
        assert answer.tokens == expected.tokens
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=tolerance)
