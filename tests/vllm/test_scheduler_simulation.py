"""No mix of requests and sessions stops progress, reads a page that was not written for it, or loses one.

The scheduler is the real one, the worker is symbolic: see support/scheduler_simulation.py.
"""

import random
from contextlib import contextmanager

import pytest

from scheduler_simulation import Chunk, Picture, Simulation, expected_answers, random_client

pytestmark = pytest.mark.vllm
# Steps in which a mix must have ended: far more than it takes, far fewer than for ever.
MAX_STEPS = 3000
# After these nobody is aborted and no cache is reset: that would end what has come to a standstill.
MAX_TURMOIL_STEPS = 60
ALLOWED_ERRORS = ("early frames are gone", "image pages; a row has", "seat was needed")
KINDS = {
    "first-come": {},
    "ca_tv": {"num_text_groups": 2},
    "async": {"is_async": True, "num_text_groups": 2},
    "priority": {"scheduling_policy": "priority"},
    "priority-async-v2": {"scheduling_policy": "priority", "is_async": True, "is_v2": True},
    # Several requests read their prompts in one step: what is scheduled first can be dropped from it.
    "priority-chunked": {"scheduling_policy": "priority", "long_prefill_token_threshold": 20, "num_text_groups": 2},
    "priority-chunked-async": {"scheduling_policy": "priority", "long_prefill_token_threshold": 20, "is_async": True},
    "no-prefix-cache": {"enable_prefix_caching": False},
    "no-prefix-cache-async-v2": {"enable_prefix_caching": False, "is_async": True, "is_v2": True},
    "roomy-v2": {"extra_blocks": 60, "max_num_seqs": 16, "is_v2": True},
    "chunked": {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 5},
}


@pytest.fixture(params=KINDS)
def simulation(request, checkpoints):
    return Simulation(checkpoints("tiny-llama", fusion="ca"), **KINDS[request.param])


def run_mix(simulation, seed):
    """Random clients that come, send chunks, leave; then what is left must end."""
    rng = random.Random(seed)
    scheduler = simulation.scheduler
    simulation.clients.clear()
    to_come = [random_client(rng) for _ in range(rng.randrange(2, 14))]
    for step in range(MAX_STEPS):
        while to_come and (step == 0 or rng.random() < 0.4):
            simulation.open(**to_come.pop())
        alive = [client for client in simulation.clients.values() if not client.is_done]
        for client in alive:
            if client.is_session and (not client.pending or rng.random() < 0.1) and rng.random() < 0.5:
                simulation.send_next(client)
            if not client.is_done and step < MAX_TURMOIL_STEPS and rng.random() < 0.01:
                simulation.abort(client)
        if step < MAX_TURMOIL_STEPS and rng.random() < 0.02:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        if step < MAX_TURMOIL_STEPS and rng.random() < 0.02:
            scheduler.reset_encoder_cache()
        worked = simulation.step()
        unfinished = [client for client in alive if client.pending or client.chunks]
        if not (worked or to_come or unfinished):
            break
    else:
        raise AssertionError(f"seed {seed}: still waiting: {[client.name for client in unfinished]}")
    # Sessions that nobody closes are idle now, and hold up nobody.
    for client in simulation.clients.values():
        if not client.is_done:
            simulation.abort(client)
        elif client.error is not None:
            simulation.close(client)
    for _ in range(MAX_STEPS):
        if not simulation.step():
            break
    for client in simulation.clients.values():
        check_answers(client, seed)
    assert not scheduler.requests and not scheduler.has_requests()
    assert simulation.free_blocks() == simulation.num_free_blocks, f"seed {seed}: pages are lost"
    assert scheduler.image_managers[0].counters.pages_in_use == 0
    assert not scheduler.image_managers[0]._pins and not scheduler._ended_sessions


def check_answers(client, seed):
    expected = expected_answers([*client.answered, *list(client.pending)[:1]])
    assert client.answers[:-1] == expected[: len(client.answered)], f"seed {seed}"
    if client.pending:
        rest = client.answers[-1]
        assert rest == expected[-1][: len(rest)], f"seed {seed}"
    if client.error is not None:
        assert any(words in client.error for words in ALLOWED_ERRORS), f"seed {seed}: {client.error}"
        assert client.is_session, f"seed {seed}: {client.error}"


def test_mixes_end_and_lose_nothing(simulation):
    for seed in range(60):
        run_mix(simulation, seed)


@contextmanager
def only_free(simulation, num_blocks):
    """Leave so many pages free."""
    pool = simulation.scheduler.kv_cache_manager.block_pool
    held = pool.get_new_blocks(pool.get_num_free_blocks() - num_blocks)
    yield
    pool.free_blocks(held)


def finish(simulation):
    for _ in range(MAX_STEPS):
        if not simulation.step():
            break
    for client in simulation.clients.values():
        check_answers(client, "none")
        assert not client.pending


def open_bystander(simulation):
    """Open a request that answers, and needs no other page, while the test goes on.

    vLLM 0.32 applies the threshold of long prompts to none that has the engine to itself.
    """
    simulation.open([Chunk([3] * 3, max_tokens=4)])


def test_text_of_a_step_that_a_request_was_dropped_from(checkpoints):
    folder = checkpoints("tiny-llama", fusion="ca")
    simulation = Simulation(folder, scheduling_policy="priority", long_prefill_token_threshold=20)
    open_bystander(simulation)
    first = simulation.open([Chunk([1] * 60)], priority=2)
    simulation.step()
    simulation.open([Chunk([2] * 8, max_tokens=4)])
    simulation.step()
    # The first takes three pages for its next 20 tokens, the second preempts it for one.
    with only_free(simulation, 3):
        simulation.step()
    assert simulation.scheduler.requests[first.name].num_preemptions == 1
    finish(simulation)


def test_image_of_a_step_that_its_writer_was_dropped_from(checkpoints):
    folder = checkpoints("tiny-llama", fusion="ca")
    simulation = Simulation(folder, scheduling_policy="priority", long_prefill_token_threshold=20)
    open_bystander(simulation)
    first = simulation.open([Chunk([1] * 60, [Picture(7, 8, 40)])], priority=2)
    simulation.step()
    simulation.open([Chunk([2] * 40, [Picture(7, 8, 30)], max_tokens=4)])
    simulation.step()
    # Both come to the image in one step; the first takes all pages for it, and is preempted by the second.
    with only_free(simulation, 4):
        simulation.step()
    assert simulation.scheduler.requests[first.name].num_preemptions == 1
    finish(simulation)


def test_a_session_preempted_with_its_last_token_on_its_way(checkpoints):
    simulation = Simulation(checkpoints("tiny-llama", fusion="ca"), is_async=True)
    simulation.open([Chunk([1] * 8, max_tokens=4)])
    session = simulation.open([Chunk([2] * 5), Chunk([3] * 3, [Picture(1, 8, 0)])], is_session=True)
    simulation.step()
    with only_free(simulation, 0):
        simulation.step()
    assert simulation.scheduler.requests[session.name].num_preemptions == 1
    for _ in range(20):
        simulation.step()
    simulation.send_next(session)
    finish(simulation)
    assert len(session.answered) == 2


def watch(simulation, session, num_frames):
    for _ in range(num_frames):
        simulation.send_next(session)
        while session.pending:
            simulation.step()


def ask(simulation, chunk):
    """Asks, and returns how many of the prompt's tokens were cached."""
    client = simulation.open([chunk])
    simulation.step()
    num_cached = simulation.worker.num_computed(client.name)
    while not client.is_done:
        assert simulation.step(), client
    return num_cached


@pytest.mark.parametrize("kind", ["first-come", "ca_tv", "async"])
def test_a_sessions_frames_leave_the_rest_in_the_cache(checkpoints, kind):
    simulation = Simulation(checkpoints("tiny-llama", fusion="ca"), **KINDS[kind])
    images, frames = simulation.scheduler.image_managers[0], range(1000, 1080)
    chat = Chunk([1] * 33, [Picture(7, 16, 20)], max_tokens=2)
    assert ask(simulation, chat) == 0
    # All of them together fill the cache several times.
    assert 4 * len(frames) > 2 * simulation.num_free_blocks
    session = simulation.open([Chunk([2], [Picture(frame, 32, 0)]) for frame in frames], is_session=True)
    watch(simulation, session, 40)
    # The one that is seen now is asked about, and again when it has passed.
    about_a_frame = Chunk([3] * 3, [Picture(frames[40], 32, 1)], max_tokens=2)
    num_encoded = images.counters.images_encoded
    ask(simulation, about_a_frame)
    watch(simulation, session, 20)
    ask(simulation, about_a_frame)
    assert images.counters.images_encoded == num_encoded + 20
    watch(simulation, session, 19)
    assert ask(simulation, chat) == 32
    assert images.counters.images_encoded == num_encoded + 39, "the chat's image is found, too"
    simulation.close(session)
    finish(simulation)
    assert simulation.free_blocks() == simulation.num_free_blocks


def test_a_page_that_was_a_frame_is_a_chats_afterwards(checkpoints):
    simulation = Simulation(checkpoints("tiny-llama", fusion="ca"))
    images = simulation.scheduler.image_managers[0]
    for number in range(4):
        session = simulation.open([Chunk([2], [Picture(1000 + number, 32, 0)])], is_session=True, closes=False)
        while session.pending:
            simulation.step()
        simulation.close(session)
    for number in range(simulation.num_free_blocks // 4):
        first = Picture(2 * number, 32, 1)
        ask(simulation, Chunk([number] * 3, [first, Picture(2 * number + 1, 16, 2)], max_tokens=2))
        ask(simulation, Chunk([number, 1, 1], max_tokens=2))
        num_encoded = images.counters.images_encoded
        ask(simulation, Chunk([number, 2], [first], max_tokens=2))
        assert images.counters.images_encoded == num_encoded, f"image {number} was evicted before older ones"


def test_a_session_that_loses_its_pages_finds_the_frames_of_its_last_text(checkpoints):
    simulation = Simulation(checkpoints("tiny-llama", fusion="ca"))
    chunks = [Chunk([number], [Picture(number, 16, 0)]) for number in range(40)]
    session = simulation.open(chunks, is_session=True, closes=False)
    watch(simulation, session, 30)
    assert not session.pending and session.error is None
    simulation.scheduler._evict(simulation.scheduler.requests[session.name])
    # They take what is evicted first.
    ask(simulation, Chunk([50] * 60, [Picture(999, 16, 1)], max_tokens=2))
    simulation.send_next(session)
    finish(simulation)
    assert session.error is None and len(session.answered) == 32


@pytest.mark.slow
def test_many_mixes_end_and_lose_nothing(simulation):
    for seed in range(1000, 4000):
        run_mix(simulation, seed)
