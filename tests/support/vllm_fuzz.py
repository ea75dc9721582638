"""Random requests against the eager model, where pages are few. Test support only."""

import random
from typing import Any

from vllm_harness import BARE_IMAGE, IMAGE, Answer, Eager, Engine, Prompt, assert_same, picture

TEXT = "The quick brown fox jumps over the lazy dog. "
# So few pages that images and text are evicted and requests preempted.
FEW_PAGES: dict[str, Any] = {"num_gpu_blocks_override": 80, "max_num_batched_tokens": 64, "max_model_len": 256}


def random_prompts(rng: random.Random, count: int) -> list[Prompt]:
    """Prompts with 0 to 4 images out of few, some of them adjacent or repeated, and shared prefixes."""
    prompts = []
    for _ in range(count):
        parts, images = [rng.choice(["", "Shared prefix of many prompts, longer than a page. "])], []
        for _ in range(rng.randrange(5)):
            parts.append(rng.choice(["", "a", "b c ", TEXT]) + rng.choice([IMAGE, BARE_IMAGE]))
            images.append(picture(rng.randrange(4), 56, rng.choice([28, 84])))
        prompts.append(Prompt("".join(parts) + rng.choice(["why?", TEXT]), tuple(images)))
    return prompts


def fuzz(vllm: Engine, oracle: Eager, seed: int, count: int) -> None:
    """Random prompts that come one after another; at most a quarter are aborted, caches are reset in between."""
    rng = random.Random(seed)
    prompts = random_prompts(rng, count)
    lengths = [rng.choice([1, 4, 16]) for _ in prompts]
    urgency = 3 if vllm.is_priority else 1
    free, waiting, names, aborted = vllm.num_free_blocks, list(range(count)), {}, set()
    answers: dict[str, Answer] = {}

    def turn():
        while waiting and rng.random() < 0.5:
            index = waiting.pop()
            names[index] = vllm.add(prompts[index], lengths[index], priority=rng.randrange(urgency))
        ended = answers.keys() | vllm.answered
        running = [index for index, name in names.items() if index not in aborted and name not in ended]
        if running and len(aborted) < count // 4 and rng.random() < 0.05:
            index = rng.choice(running)
            vllm.engine.abort_request([names[index]], internal=False)
            aborted.add(index)
        if rng.random() < 0.02:
            vllm.engine.reset_prefix_cache(reset_running_requests=True)
        if rng.random() < 0.02:
            vllm.scheduler.reset_encoder_cache()

    while waiting or vllm.engine.has_unfinished_requests():
        turn()
        answers |= vllm.run(turn)
    whole = [index for index in names if index not in aborted]
    expected = [oracle(prompts[index], lengths[index]) for index in whole]
    assert_same([answers[names[index]] for index in whole], expected)
    assert vllm.num_free_blocks == free
    assert vllm.images.counters.pages_in_use == 0
