"""Pages that a request reads were written for it: every page is spoiled when it is taken (NaN for images)."""

import pytest

from vllm_fuzz import FEW_PAGES, fuzz
from vllm_harness import BARE_IMAGE, IMAGE, Prompt, assert_same, picture

pytestmark = pytest.mark.vllm
NUM_TOKENS = 6
OPTIONS = {
    "first-come": {},
    "async": {"is_async": True},
    "priority": {"scheduling_policy": "priority"},
    "priority-async": {"scheduling_policy": "priority", "is_async": True},
    "no-prefix-cache": {"enable_prefix_caching": False},
    "no-prefix-cache-priority-async": {
        "enable_prefix_caching": False,
        "scheduling_policy": "priority",
        "is_async": True,
    },
}
MODELS = {
    "llama-ca": ("tiny-llama", {"fusion": "ca"}),
    "qwen-ca_tv": ("tiny-qwen", {"fusion": "ca_tv"}),
    "llama-ca_tv-shared": ("tiny-llama", {"fusion": "ca_tv", "ca_weights": "shared"}),
    "qwen-ca-shared": ("tiny-qwen", {"fusion": "ca", "ca_weights": "shared"}),
}


@pytest.mark.parametrize(
    "options", [OPTIONS["no-prefix-cache"], OPTIONS["priority"]], ids=["no-prefix-cache", "priority"]
)
def test_an_image_twice_in_one_step(options, checkpoints, eager, engine):
    folder = checkpoints("tiny-llama", fusion="ca")
    vllm = engine(folder, poison=True, **options)
    # Pages that hold other requests' images are what the copies would read.
    vllm.ask([Prompt(f"{IMAGE} {index}", (picture(index),)) for index in range(20)], 1)
    one = picture(100)
    prompts = [
        Prompt(f"a {IMAGE} b {IMAGE} c", (one, one)),
        Prompt(f"a {BARE_IMAGE}{BARE_IMAGE}{BARE_IMAGE} b", (one, picture(101), one)),
        # Two requests in one step, both of them twice.
        Prompt(f"d {IMAGE} e {IMAGE} f {IMAGE}", (picture(102), one, picture(102))),
    ]
    for priority in (0, 1):
        answers = vllm.ask(prompts, NUM_TOKENS, priority=priority * ("scheduling_policy" in options))
        assert_same(answers, [eager(folder)(prompt, NUM_TOKENS) for prompt in prompts])
    assert vllm.images.counters.pages_in_use == 0


def test_one_identifier_for_two_images(checkpoints, eager, engine):
    """What a client names the same need not be the same; pages are not shared between sizes."""
    folder = checkpoints("tiny-llama", fusion="ca")
    # Without the cache of processed images, which goes by the same name.
    vllm = engine(folder, poison=True, enable_prefix_caching=False, mm_processor_cache_gb=0)
    prompt = Prompt(f"a {IMAGE} b {IMAGE} c", (picture(1, 56, 56), picture(2, 112, 56)))
    rendered = vllm.render(prompt)
    rendered["mm_hashes"]["image"] = ["same", "same"]
    name = vllm.add_rendered(rendered, NUM_TOKENS)
    assert_same([vllm.run()[name]], [eager(folder)(prompt, NUM_TOKENS)])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("model", ["llama-ca", "qwen-ca_tv"])
def test_random_requests(model, options, checkpoints, eager, engine):
    preset, fields = MODELS[model]
    folder = checkpoints(preset, **fields)
    fuzz(engine(folder, poison=True, **FEW_PAGES, **options), eager(folder), seed=1, count=12)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_many_random_requests(model, options, checkpoints, eager, engine):
    preset, fields = MODELS[model]
    folder = checkpoints(preset, **fields)
    for seed in range(100, 110):
        fuzz(engine(folder, poison=True, **FEW_PAGES, **options), eager(folder), seed, count=40)
