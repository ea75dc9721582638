"""`casa bench` with vLLM in this process: its pages are counted, and it keeps what the eager model keeps."""

import os
from contextlib import closing
from unittest import mock

import pytest

from casa_bench.backend import Needs
from casa_bench.chat import CHAT, user_message
from casa_bench.eager_backend import EagerBackend
from casa_bench.engine_backend import EngineBackend, EngineSettings
from casa_bench.frames import noise_frame
from casa_bench.reuse import REUSE
from casa_engine.errors import InputError

pytestmark = pytest.mark.vllm
SIDE_PX, TOKENS, TURNS = 112, 16, 12
NEEDS = Needs(images=64, image_px=SIDE_PX, tokens_per_image=128, concurrency=3)


@pytest.fixture(scope="module")
def checkpoint(checkpoints):
    """Folder of a tiny random `ca` model."""
    return checkpoints("tiny-llama", fusion="ca")


@pytest.fixture(scope="module")
def engine(checkpoint):
    """An engine of the random `ca` model; what it sets in the environment goes with it."""
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        settings = EngineSettings(dtype="float32", kv_cache_gib=0.25, enforce_eager=True)
        backend = EngineBackend(checkpoint, NEEDS, settings)
        yield backend
        backend.close()


def pages_in_use(engine):
    """Pages that any request holds."""
    pool = engine.engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


def turns_of(backend):
    """Turns of one conversation, which is closed afterwards."""
    stream = backend.open_stream()
    try:
        return [stream.turn(noise_frame(0, number, SIDE_PX), TOKENS) for number in range(TURNS)]
    finally:
        stream.close()


def test_a_stream_keeps_what_the_eager_model_keeps(engine, checkpoint):
    import torch

    turns = turns_of(engine)
    eager = turns_of(EagerBackend(checkpoint, Needs(TURNS, SIDE_PX, 128), torch.float32))
    # The engine reads a turn's stop token with the next frame.
    assert [turn.kv_tokens for turn in turns] == [turn.kv_tokens - 1 for turn in eager]
    assert {turn.tokens for turn in turns} == {TOKENS}
    assert all(turn.ttft_ms > 0 and turn.decode_ms > 0 and turn.cpu_ms > 0 for turn in turns)
    scheduler = engine.engine.engine_core.engine_core.scheduler
    page_tokens = scheduler.block_size
    text_pages = [-(-turn.kv_tokens // page_tokens) for turn in turns]
    page_bytes = turns[0].kv_bytes // (text_pages[0] + 1)
    # One page for the 16 tokens of the latest image, however many there were.
    assert [turn.kv_bytes for turn in turns] == [(pages + 1) * page_bytes for pages in text_pages]
    assert pages_in_use(engine) == 0


def test_a_stream_ends_beside_another(engine):
    with closing(engine.open_stream()) as stream:
        stream.turn(noise_frame(0, 0, SIDE_PX), TOKENS)
        alone = pages_in_use(engine)
        with closing(engine.open_stream()) as fresh:
            fresh.turn(noise_frame(1, 0, SIDE_PX), TOKENS)
        assert pages_in_use(engine) == alone
        stream.turn(noise_frame(0, 1, SIDE_PX), TOKENS)
    assert pages_in_use(engine) == 0


def test_the_pool_is_all_that_was_allocated_for_pages(engine):
    """On a GPU it is subtracted from what torch has allocated."""
    core = engine.engine.engine_core.engine_core
    caches = core.model_executor.driver_worker.worker.model_runner.kv_caches
    storages = {storage.data_ptr(): storage.nbytes() for storage in (cache.untyped_storage() for cache in caches)}
    assert engine.pool_bytes == sum(storages.values())
    stream = engine.open_stream()
    turn, pages = stream.turn(noise_frame(0, 0, SIDE_PX), TOKENS), pages_in_use(engine)
    stream.close()
    page_bytes = engine.pool_bytes // core.scheduler.kv_cache_config.num_blocks
    assert turn.kv_bytes == pages * page_bytes < engine.pool_bytes


def test_chats_run_together_and_reuse_is_measured(engine):
    settings = {
        "concurrency": 3,
        "turns": 2,
        "tokens": 4,
        "image_size": SIDE_PX,
        "seed": 0,
        "images": 2,
        "questions": 3,
    }
    rows = list(CHAT.run(engine, settings))
    assert [len(row["ttft_ms"]) for row in rows] == [3, 3]
    assert all(row["tokens"] == [4, 4, 4] for row in rows)
    summary = CHAT.summarize(rows)
    assert summary["answers_per_s"] > 0
    assert len(CHAT.cells(summary)) == len(CHAT.columns)
    rows = list(REUSE.run(engine, settings))
    assert [len(row["ttft_ms"]) for row in rows] == [3, 3]
    assert len(REUSE.cells(REUSE.summarize(rows))) == len(REUSE.columns)
    assert pages_in_use(engine) == 0


def test_a_chat_that_does_not_fit_is_one_sentence(engine):
    """vLLM's own error is no ValueError: it was a traceback."""
    long = [user_message(noise_frame(0, 0, SIDE_PX), "word " * 100_000)]
    with pytest.raises(InputError, match="the engine refuses a prompt"):
        engine.answer([long], 4)
    assert engine.answer([[user_message(noise_frame(0, 0, SIDE_PX), "word")]], 4)[0].tokens == 4
    assert pages_in_use(engine) == 0


def test_the_second_question_encodes_no_image(engine):
    """Counted, not timed: docs/benchmarks.md has the times."""
    images = engine.engine.engine_core.engine_core.scheduler.image_managers[0]
    settings = {"tokens": 4, "image_size": SIDE_PX, "seed": 77, "images": 2, "questions": 3}
    encoded = images.counters.images_encoded
    assert len(list(REUSE.run(engine, settings))) == 2
    assert images.counters.images_encoded - encoded == 3
