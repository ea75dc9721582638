"""The two processes' caches of images: no sequence of requests makes one believe what the other does not hold."""

import asyncio
import random
import sys
import threading

import pytest
import torch

from casa_engine.errors import InputError
from casa_engine.image_owner import OWNER, scope_image_name
from casa_engine.image_patches import PatchValues
from casa_engine.image_preparation import EncodedImage
from vllm_harness import Engine, Prompt, picture

pytestmark = pytest.mark.vllm

MARKER = "<|image_pad|>"
# Room for about five pictures of 56 x 56 px (16 patches of 588 bytes, and what vLLM counts beside them).
CACHE_GB = 60_000 / 2**30


def new_renderer(folder, **options):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers.registry import renderer_from_config

    config = EngineArgs(
        str(folder),
        dtype="float32",
        max_model_len=1024,
        max_num_batched_tokens=512,
        limit_mm_per_prompt={"image": 250},
        mm_processor_cache_gb=CACHE_GB,
        **options,
    ).create_engine_config()
    return renderer_from_config(config)


@pytest.fixture(scope="module")
def renderer(checkpoints):
    """What the API process has: vLLM's renderer, with the processor and its cache. There is no engine."""
    made = new_renderer(checkpoints("tiny-qwen", fusion="ca_tv"))
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def processor(renderer):
    return renderer.mm_processor


def rendered(renderer, images, names=None, *, apart=True):
    """What a request becomes before it is handed to the engine."""
    from vllm.multimodal.processing import TimingContext
    from vllm.multimodal.processing.inputs import ProcessorInputs

    processor = renderer.mm_processor
    token = processor.info.get_hf_config().image_token_id
    inputs = ProcessorInputs(
        [5, *(value for number in range(len(images)) for value in ((6 + number, token) if apart else (token,)))],
        processor.info.parse_mm_data({"image": images}),
        {"image": names} if names else None,
    )
    if hasattr(inputs, "cache"):
        inputs.cache = renderer.mm_processor_cache
    return processor.apply(inputs, TimingContext(enabled=False))


def received(cache, prompt):
    """What the engine's process makes of a request that reaches it: vLLM's own features and cache."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    features = [
        MultiModalFeatureSpec(data=item, modality="image", identifier=key, mm_position=position, mm_hash=key)
        for item, key, position in zip(
            prompt["mm_kwargs"]["image"], prompt["mm_hashes"]["image"], prompt["mm_placeholders"]["image"], strict=True
        )
    ]
    return cache.get_and_update_features(features)


@pytest.mark.parametrize("seed", range(6))
def test_random_requests(renderer, processor, seed):
    """Requests in any order, refused before or behind rendering, overtaking each other, larger than either cache."""
    from vllm.multimodal import cache as caches

    numbers = random.Random(seed)
    # 0.29.0, and its name from 0.32 on.
    receiver = getattr(caches, "MultiModalReceiverCache", None) or caches.LruKeyReplicatedReceiverCache
    cache = receiver(renderer.model_config)
    renderer.clear_mm_cache()
    pictures = [picture(number, *numbers.choice([(56, 56), (84, 56), (112, 112)])) for number in range(24)]
    expected = [processor.info.get_hf_processor().image_bytes(each)[0] for each in pictures]
    on_the_way = []
    for _ in range(150):
        chosen = numbers.choices(range(len(pictures)), k=numbers.choice([1, 1, 2, 5, 20]))
        event = numbers.choice(["sent", "sent", "late", "refused", "too many", "cleared", "engine cleared", "unknown"])
        if event == "too many":
            with pytest.raises(ValueError, match="adjacent images share one window"):
                rendered(renderer, [pictures[number] for number in chosen] + [picture(99)] * 200, apart=False)
        elif event == "unknown":
            with pytest.raises(InputError, match="Cache miss"):
                rendered(
                    renderer, [pictures[number] for number in chosen] + [None], [None] * len(chosen) + ["nobody's"]
                )
        elif event == "cleared":
            renderer.clear_mm_cache()
        elif event == "engine cleared":
            cache.clear_cache()
        else:
            prompt = rendered(renderer, [pictures[number] for number in chosen])
            if event != "refused":
                on_the_way.append((chosen, prompt))
        if event != "late":
            numbers.shuffle(on_the_way)
            for numbers_sent, prompt in on_the_way:
                features = received(cache, prompt)
                for number, feature in zip(numbers_sent, features, strict=True):
                    assert torch.equal(feature.data["pixel_values"].data, expected[number])
            on_the_way = []


def test_threads_statistics_are_never_negative(processor):
    """vLLM's counter of queries ends the server over a negative number."""
    from casa_vllm.image_items import ImageItemCache

    cache = ImageItemCache(processor.info.ctx.model_config)
    ended, negative = threading.Event(), []

    def look():
        while not ended.is_set():
            cache.get("nothing")
            if (stats := cache.make_stats(delta=True)).total < 0 or stats.hits < 0:
                negative.append(stats)

    threads = [threading.Thread(target=look) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(300):
            cache.clear_cache()
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        for thread in threads:
            thread.join()
    assert not negative


def test_an_items_memory_is_its_own(renderer):
    """An item that stays in a cache does not keep the other images of its prompt."""
    renderer.clear_mm_cache()
    prompt = rendered(renderer, [picture(1), picture(2, 112, 112)])
    for item in prompt["mm_kwargs"]["image"]:
        values = item["pixel_values"].data
        assert values.dtype == torch.uint8
        assert values.untyped_storage().nbytes() == values.nbytes


class MetImage(EncodedImage):
    """An image whose decoding waits until another is being decoded."""

    def __init__(self, number, barrier):
        self.data, self._barrier, self._picture = bytes([number]), barrier, picture(number)

    def decode(self):
        self._barrier.wait(timeout=60)
        return self._picture


@pytest.mark.parametrize("fusion", ["ca_tv", "insertion"])
def test_requests_images_are_processed_at_once(checkpoints, fusion):
    made = new_renderer(checkpoints("tiny-qwen", fusion=fusion), renderer_num_workers=2)
    barrier = threading.Barrier(2)

    async def work():
        images = [MetImage(number, barrier) for number in (1, 2)]
        prompts = [{"prompt": f"Read {MARKER}", "multi_modal_data": {"image": [image]}} for image in images]
        return await asyncio.gather(*(made.render_cmpl_async([prompt]) for prompt in prompts))

    one, two = asyncio.run(work())
    hf = made.mm_processor.info.get_hf_processor()
    for number, [prompt] in ((1, one), (2, two)):
        [item] = prompt["mm_kwargs"]["image"]
        assert torch.equal(item["pixel_values"].data, hf.image_bytes(picture(number))[0])
    made.shutdown()


def test_the_encoder_gets_what_the_eager_model_gets(processor):
    hf = processor.info.get_hf_processor()
    images = [picture(3, 300, 411), picture(4), picture(5, 900, 20)]
    expected = hf.process_images(images)
    pixels, grids = zip(*map(hf.image_bytes, images), strict=True)
    grids = torch.stack(grids)
    values = PatchValues(hf.image_processor)
    assert torch.equal(grids, expected["image_grid_thw"])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(values(torch.cat(pixels), grids, dtype), expected["pixel_values"].to(dtype))


def test_names_point_to_what_was_sent_last(renderer):
    renderer.clear_mm_cache()
    one, two = picture(1), picture(2)
    first = rendered(renderer, [one], ["a"])["mm_hashes"]
    assert rendered(renderer, [None], ["a"])["mm_hashes"] == first == rendered(renderer, [one])["mm_hashes"]
    second = rendered(renderer, [two], ["a"])["mm_hashes"]
    assert second != first
    assert rendered(renderer, [None], ["a"])["mm_hashes"] == second
    both = rendered(renderer, [one, None], ["b", "b"])["mm_hashes"]["image"]
    assert both == first["image"] * 2
    with pytest.raises(InputError, match="Cache miss"):
        rendered(renderer, [None], first["image"])


def test_names_differ_between_clients():
    seen = set()
    for owner in ("", "one", "two"):
        token = OWNER.set(owner)
        seen |= {scope_image_name("uuid", salt) for salt in (None, "salt")} | {scope_image_name("uuidsalt")}
        OWNER.reset(token)
    assert len(seen) == 9


@pytest.mark.parametrize(
    "image", ["file.png", "http://127.0.0.1/x", b"x", {"image": "x"}, [[1, 2, 3]], 5, torch.zeros(2, 8, 128)]
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_programs_prompt_holds_pixels(renderer, image, whole):
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    prompt = {"prompt": f"x{MARKER}", "multi_modal_data": {"image": image if whole else [image]}}
    with pytest.raises(ValueError, match="expected"):
        renderer.render_cmpl([parse_model_prompt(renderer.model_config, prompt)], renderer.default_cmpl_tok_params)


@pytest.mark.parametrize("modality", ["audio", "video", "vision_chunk", "anything"])
def test_a_programs_prompt_holds_no_other_modality(renderer, modality):
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    prompt = {"prompt": "x", "multi_modal_data": {modality: ["file"]}}
    with pytest.raises(ValueError, match="modality"):
        renderer.render_cmpl([parse_model_prompt(renderer.model_config, prompt)], renderer.default_cmpl_tok_params)


def test_arrays_and_images_are_one_picture(renderer):
    import numpy as np

    image = picture(8)
    array = np.asarray(image)
    keys = [
        rendered(renderer, [each])["mm_hashes"]
        for each in (image, array, torch.from_numpy(array), image.convert("RGBA"))
    ]
    assert all(key == keys[0] for key in keys)


@pytest.mark.parametrize(
    "option", [{"enable_mm_embeds": True}, {"mm_processor_cache_type": "shm"}, {"tokenizer_mode": "slow"}]
)
def test_options_that_open_another_door(checkpoints, option):
    with pytest.raises(ValueError, match="CASA models"):
        Engine(checkpoints("tiny-qwen", fusion="ca_tv"), **option)


def test_answers_are_the_same_whatever_was_refused_between(checkpoints, engine):
    """Through the real engine, with a cache that holds less than a prompt."""
    running = engine(checkpoints("tiny-qwen", fusion="ca_tv"), mm_processor_cache_gb=CACHE_GB)
    prompt = Prompt("".join(f"x{MARKER}" for _ in range(9)) + "y", tuple(picture(40 + number) for number in range(9)))
    first = running.ask([prompt], 4)
    for _ in range(3):
        running.render(prompt)  # And never handed to the engine.
        assert running.ask([prompt], 4) == first
