"""Pages of images through chunks, caches, evictions, preemption, async scheduling and aborts."""

import random

import pytest

from interpreter_process import IS_V2, V2, check_under_interpreter
from vllm_harness import BLOCK_SIZE, IMAGE, Prompt, assert_same, picture

pytestmark = pytest.mark.vllm
NUM_TOKENS = 6
LONG = "The quick brown fox jumps over the lazy dog again. "
MODELS = {
    "llama-ca": ("tiny-llama", {"fusion": "ca"}),
    "qwen-ca_tv": ("tiny-qwen", {"fusion": "ca_tv"}),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, checkpoints):
    preset, fields = MODELS[request.param]
    return checkpoints(preset, **fields)


@pytest.fixture
def oracle(folder, eager):
    return lambda prompts: [eager(folder)(prompt, NUM_TOKENS) for prompt in prompts]


def conversation(num_images, seed=0, text=LONG):
    images = tuple(picture(seed + index) for index in range(num_images))
    return Prompt("".join(f"{index} {IMAGE} {text}" for index in range(num_images)), images)


def shuffled_pictures(seed, count):
    """Prompts with 0 to 3 images out of few, so that they share images and prefixes."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(count):
        parts, images = [], []
        for _ in range(rng.randrange(4)):
            parts.append(f"{rng.choice(['a', 'b c ', LONG])}{IMAGE}")
            images.append(picture(rng.randrange(5), 56, rng.choice([28, 84])))
        prompts.append(Prompt("".join(parts) + rng.choice(["why?", LONG]), tuple(images)))
    return prompts


def test_warm_text_cache_and_evicted_images(folder, oracle, engine):
    prompt = Prompt(f"{LONG * 2}{IMAGE}{LONG * 2}{IMAGE}{LONG * 2}", (picture(1), picture(2)))
    expected = oracle([prompt])
    vllm = engine(folder)
    assert_same(vllm.ask([prompt], NUM_TOKENS), expected)
    encoded = vllm.images.counters.images_encoded
    assert_same(vllm.ask([prompt], NUM_TOKENS), expected)
    assert vllm.images.counters.images_encoded == encoded, "warm: everything is in the cache"

    # Pages of images evicted while the text prefix stays: the last image is encoded again.
    vllm.images.reset_cache()
    assert_same(vllm.ask([prompt], NUM_TOKENS), expected)
    assert vllm.images.counters.images_encoded == encoded + 1

    # The same text with another image is another prefix; the same image elsewhere is found.
    other = Prompt(prompt.text, (picture(3), picture(2)))
    moved = Prompt(f"see {IMAGE} now", (picture(2),))
    assert_same(vllm.ask([other], NUM_TOKENS), oracle([other]))
    encoded = vllm.images.counters.images_encoded
    assert_same(vllm.ask([moved], NUM_TOKENS), oracle([moved]))
    assert vllm.images.counters.images_encoded == encoded


def test_blocks_completed_by_generation_know_all_their_images(folder, oracle, engine):
    # Two images in a block that only generated tokens complete; then another first image.
    text = f"a {IMAGE} b {IMAGE} c"
    first = Prompt(text, (picture(31), picture(32)))
    second = Prompt(text, (picture(33), picture(32)))
    vllm = engine(folder)
    grown = BLOCK_SIZE + 2
    (answer,) = vllm.ask([first], grown)
    continued = Prompt(text + vllm.engine.tokenizer.decode(answer.tokens), second.images)
    assert_same(vllm.ask([continued], NUM_TOKENS), oracle([continued]))


def test_eight_chats_share_one_image(folder, oracle, engine):
    image = picture(40, 280, 224)
    prompts = [Prompt(f"{'x' * (5 * chat)} {IMAGE} chat {chat}", (image,)) for chat in range(8)]
    expected = oracle(prompts)
    vllm = engine(folder)
    vllm.forget_text()
    before = vllm.images.counters.images_encoded
    num_pages = -(-80 // BLOCK_SIZE)
    names, most = [vllm.add(prompt, NUM_TOKENS) for prompt in prompts], [0]

    def watch():
        most[0] = max(most[0], vllm.images.counters.pages_in_use)

    answers = vllm.run(watch)
    assert_same([answers[name] for name in names], expected)
    assert vllm.images.counters.images_encoded == before + 1
    assert most[0] == num_pages, "the image's pages exist once"
    assert vllm.images.counters.pages_in_use == 0


def test_tenants_do_not_share(folder, engine):
    vllm = engine(folder)
    before = vllm.images.counters.images_encoded
    for salt in ("one", "two", "one"):
        vllm.ask([Prompt(f"{IMAGE} salted", (picture(50),), cache_salt=salt)], 1)
    assert vllm.images.counters.images_encoded == before + 2


def test_long_conversation_holds_two_images(folder, engine):
    """Chunks shorter than a window, so that no step needs more than the image before it and a new one."""
    vllm = engine(folder, max_num_batched_tokens=8, max_num_seqs=2, max_model_len=4096)
    vllm.add(conversation(200, seed=100, text="ok. "), 4)
    per_image, most = 1, [0]

    def watch():
        most[0] = max(most[0], vllm.images.counters.pages_in_use)

    vllm.run(watch)
    assert vllm.images.counters.images_encoded == 200
    assert most[0] <= 2 * per_image
    assert vllm.images.counters.pages_released >= 199


def test_chunks_of_32_tokens(folder, oracle, engine):
    prompts = [conversation(4), Prompt(LONG * 3), conversation(2, seed=2, text=LONG * 2)]
    vllm = engine(folder, max_num_batched_tokens=32, max_model_len=4096)
    assert_same(vllm.ask(prompts, NUM_TOKENS), oracle(prompts))


@pytest.mark.parametrize(
    "options",
    [
        {"is_async": True},
        {"scheduling_policy": "priority", "is_async": True},
        {"enable_prefix_caching": False},
        {},
    ],
    ids=["async", "priority-async", "no-prefix-cache", "first-come"],
)
def test_all_is_computed_again_after_resets(folder, eager, engine, options):
    prompts, grown = shuffled_pictures(7, 8), 20
    vllm = engine(folder, num_gpu_blocks_override=80, max_num_batched_tokens=64, max_model_len=256, **options)
    free = vllm.num_free_blocks
    rng = random.Random(3)
    urgency = 3 if "scheduling_policy" in options else 1
    names = [vllm.add(p, grown, priority=rng.randrange(urgency)) for p in prompts]
    preemptions, steps = [0], [0]

    def watch():
        steps[0] += 1
        requests = vllm.scheduler.requests.values()
        preemptions.append(sum(request.num_preemptions for request in requests))
        if steps[0] in (8, 21):
            # Text and images are lost, too: everything is computed again.
            vllm.engine.reset_prefix_cache(reset_running_requests=True)

    answers = vllm.run(watch)
    assert max(preemptions) > len(prompts) // 2
    expected = [eager(folder)(prompt, grown) for prompt in prompts]
    assert_same([answers[name] for name in names], expected)
    assert vllm.num_free_blocks == free
    assert vllm.images.counters.pages_in_use == 0


def test_pages_run_out_while_answers_grow(checkpoints, eager, engine):
    folder, grown = checkpoints("tiny-qwen", fusion="ca_tv"), 40
    prompts = [Prompt(f"{index:02} {LONG}{IMAGE}", (picture(index),)) for index in range(14)]
    vllm = engine(folder, num_gpu_blocks_override=80, max_num_batched_tokens=64, max_model_len=256)
    names, preemptions = [vllm.add(prompt, grown) for prompt in prompts], [0]

    def watch():
        requests = vllm.scheduler.requests.values()
        preemptions.append(sum(request.num_preemptions for request in requests))

    answers = vllm.run(watch)
    assert max(preemptions) > 0
    expected = [eager(folder)(prompt, grown) for prompt in prompts]
    assert_same([answers[name] for name in names], expected)


@pytest.mark.slow
@pytest.mark.skipif(IS_V2, reason="this is that process")
def test_the_two_above_on_model_runner_v2():
    """The tests of resets and of pages that run out, in a process of their own; some 25 minutes."""
    check_under_interpreter(__file__, *V2, "-k", "resets or run_out", timeout_s=5400)


def test_aborts_leave_no_pages(checkpoints, engine):
    folder = checkpoints("tiny-qwen", fusion="ca_tv")
    rng = random.Random(11)
    vllm = engine(folder, num_gpu_blocks_override=80, max_num_batched_tokens=64, max_model_len=256)
    free = vllm.num_free_blocks
    prompts = [Prompt(f"{i % 7}{IMAGE * (i % 3)} x", pictures(i, i % 3)) for i in range(500)]
    doomed = set(rng.sample(range(500), 100))
    waiting, running, num_aborted = list(range(500)), {}, 0

    def refill():
        nonlocal num_aborted
        alive = {state.external_req_id for state in request_states(vllm)}
        for index in [index for index, name in running.items() if name not in alive]:
            del running[index]
        while waiting and len(running) < 16:
            index = waiting.pop()
            running[index] = vllm.add(prompts[index], 6 if index in doomed else rng.randrange(1, 4))
        for index in [index for index in running if index in doomed and rng.random() < 0.4]:
            vllm.engine.abort_request([running.pop(index)], internal=False)
            num_aborted += 1

    refill()
    while waiting or vllm.engine.has_unfinished_requests():
        vllm.run(refill)
        refill()
    assert num_aborted > 80
    assert vllm.num_free_blocks == free
    assert vllm.images.counters.pages_in_use == 0


def pictures(seed, count):
    return tuple(picture((seed + index) % 11, 28, 56) for index in range(count))


def request_states(vllm):
    return vllm.engine.output_processor.request_states.values()
