"""Live sessions through AsyncLLM say what the eager model says: alone, together, through trims, losses and resumes."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from casa_digits.cases import draw_video
from casa_engine.checkpoints import load_model
from casa_engine.digits import checkpoint_path
from casa_engine.errors import InputError
from casa_engine.live.eager_stream import EagerStream

pytestmark = pytest.mark.vllm
NUM_FRAMES, NUM_SESSIONS = 40, 8
BUDGET = 144
QUESTION = "Read the digits."
# Pages for eight sessions and a chat; two long chats more than fill them.
NUM_PAGES = 150


def frames_of(seed, num_frames=NUM_FRAMES):
    video = draw_video(np.random.default_rng([7, seed]), num_frames, min_hold=1, max_hold=4)
    return [Image.fromarray(frame) for frame in video.frames]


class Meter:
    """What the engine reports of its pages after every step."""

    def __init__(self):
        from casa_vllm.metrics import ImageStatLogger

        self.image_pages, self.free_pages, self.max_image_pages = 0, 0, 0
        record = ImageStatLogger.record

        def and_note(logger, scheduler_stats=None, *args, **kwargs):
            if scheduler_stats is not None:
                counters = logger.read()
                self.image_pages = counters["image_pages_in_use"]
                self.free_pages = counters["image_pages_free"]
                self.max_image_pages = max(self.max_image_pages, self.image_pages)
            return record(logger, scheduler_stats, *args, **kwargs)

        ImageStatLogger.record = and_note


class Rig:
    """The engine, its meter, and one event loop for all tests."""

    def __init__(self):
        from casa_serving.live.session import LiveEngine, start_engine

        self.runner = asyncio.Runner()
        self.meter = Meter()
        options = {"enforce_eager": True, "block_size": 32, "num_gpu_blocks_override": NUM_PAGES}
        options |= {"max_model_len": 640, "max_num_batched_tokens": 256, "disable_log_stats": False}
        self.engine = self.run(start_engine(checkpoint_path(), **options))
        self.live = LiveEngine(self.engine, checkpoint_path())
        self.settings = replace(self.live.defaults, text_budget=BUDGET)
        self.model = load_model(checkpoint_path())

    def run(self, work):
        return self.runner.run(work)

    def eager(self, settings, history=()):
        return EagerStream(self.model, self.live.format, settings, history)

    async def chat(self, num_tokens=8):
        """An ordinary request; when it has ended, so has everything that was given up before."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        prompt = {"prompt": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"}
        async for output in self.engine.generate(prompt, params, f"chat-{np.random.random()}"):
            last = output
        return list(last.outputs[0].token_ids)

    async def free_pages(self):
        """Free pages when nothing else runs."""
        await asyncio.sleep(0.1)
        await self.chat()
        await asyncio.sleep(0.1)
        assert self.meter.image_pages == 0
        return self.meter.free_pages

    def close(self):
        self.engine.shutdown()
        self.runner.close()


@pytest.fixture(scope="module")
def rig():
    rig = Rig()
    yield rig
    rig.close()


async def caption(session, frame, timestamp=0.0):
    """One frame's result; its deltas must add up to the caption."""
    *deltas, result = [item async for item in session.caption(frame, timestamp)]
    assert "".join(delta.text for delta in deltas) == result.caption or result.restarted
    return result


async def ask(session, question=QUESTION):
    *deltas, result = [item async for item in session.ask(question)]
    assert "".join(delta.text for delta in deltas) == result.answer
    return result


async def watch(session, frames):
    return [await caption(session, frame) for frame in frames]


@pytest.fixture(scope="module")
def wanted(rig):
    """Captions of the eager model, frame by frame, for each video."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Waiting for each other on a busy machine would take far longer.
    streams = [rig.eager(rig.settings) for _ in range(NUM_SESSIONS)]
    captions = [[stream.caption(frame) for frame in frames_of(seed)] for seed, stream in enumerate(streams)]
    torch.set_num_threads(threads)
    return captions


def with_restarts(rig, frames, results):
    """Captions of an eager stream that reads its text anew at the frames at which the engine's session did."""
    stream, captions = rig.eager(rig.settings), []
    for frame, result in zip(frames, results, strict=True):
        if result.restarted:
            stream.transcript.reset()
        captions.append(stream.caption(frame))
    return captions


def test_one_session_says_what_the_eager_model_says(rig, wanted):
    async def work():
        free = await rig.free_pages()
        rig.meter.max_image_pages = 0
        session = await rig.live.open(rig.settings)
        results = await watch(session, frames_of(0))
        most = rig.meter.max_image_pages
        await session.close()
        assert await rig.free_pages() == free
        return results, most

    results, most = rig.run(work())
    assert [result.caption for result in results] == wanted[0]
    assert sum(result.trimmed for result in results) >= 1
    assert not any(result.restarted for result in results)
    assert all(result.text_tokens <= BUDGET for result in results)
    assert 0 < most <= 2 * max(result.image_pages for result in results)
    assert all(0 < result.ttft_ms <= result.total_ms for result in results)


def test_eight_sessions_beside_a_chat(rig, wanted):
    assert rig.live.capacity(rig.settings) >= NUM_SESSIONS

    async def work():
        free, alone = await rig.free_pages(), await rig.chat(60)
        sessions = [await rig.live.open(rig.settings) for _ in range(NUM_SESSIONS)]
        watched = asyncio.gather(*(watch(session, frames_of(seed)) for seed, session in enumerate(sessions)))
        beside = await rig.chat(60)
        results = await watched
        await asyncio.gather(*(session.close() for session in sessions))
        assert beside == alone
        assert await rig.free_pages() == free
        return results

    results = rig.run(work())
    assert [[result.caption for result in each] for each in results] == wanted


def test_rules_and_questions_say_what_the_eager_model_says(rig):
    """Settings under which every rule bites, captions are cut, and questions come between frames and trims."""
    settings = replace(rig.settings, repetition_penalty=1.3, stop_bias=0.7, ngram_size=3, ngram_window=40)
    settings = replace(settings, max_frame_tokens=5, max_answer_tokens=9, prompt="I see")
    stream, frames = rig.eager(settings), frames_of(30, 24)

    async def work():
        session, said = await rig.live.open(settings), []
        with pytest.raises(InputError, match="special tokens"):
            await ask(session, "<|im_end|>")
        for number, frame in enumerate(frames):
            said.append((await caption(session, frame)).caption)
            if number % 5 == 4:
                said.append((await ask(session)).answer)
        assert session.transcript.ids == stream.transcript.ids
        await session.close()
        return said

    expected = []
    for number, frame in enumerate(frames):
        expected.append(stream.caption(frame))
        if number % 5 == 4:
            expected.append(stream.ask(QUESTION))
    assert expected[0].startswith("I see")
    assert rig.run(work()) == expected


def test_resumed_from_history(rig):
    frames = frames_of(40, 16)
    first = rig.eager(rig.settings)
    for frame in frames[:8]:
        first.caption(frame)
    history = first.transcript.history
    stream = rig.eager(rig.settings, history)

    async def work():
        session = await rig.live.open(rig.settings, history)
        results = await watch(session, frames[8:])
        await session.close()
        return [result.caption for result in results]

    assert rig.run(work()) == [stream.caption(frame) for frame in frames[8:]]


def test_a_lost_request_is_begun_again(rig):
    """The engine gives the request up in the middle: the same frame is answered by a new one."""

    async def work():
        free = await rig.free_pages()
        session = await rig.live.open(rig.settings)
        results = []
        for number, frame in enumerate(frames_of(0, 12)):
            if number == 6:
                await rig.engine.abort(list(rig.engine.output_processor.request_states), internal=True)
            results.append(await caption(session, frame))
        await session.close()
        assert await rig.free_pages() == free
        return results

    results = rig.run(work())
    assert [result.restarted for result in results] == [number == 6 for number in range(12)]
    assert [result.caption for result in results] == with_restarts(rig, frames_of(0, 12), results)


def test_preempted_sessions_go_on(rig):
    """Chats take all pages, so that sessions lose theirs, text and all, in the middle of a frame."""
    frames = [frames_of(50 + number, 30) for number in range(3)]

    async def work():
        free = await rig.free_pages()
        sessions = [await rig.live.open(rig.settings) for _ in range(3)]
        firsts = [await caption(session, mine[0]) for session, mine in zip(sessions, frames, strict=True)]
        chats = [asyncio.create_task(rig.chat(560)) for _ in range(6)]

        async def watch_while_they_talk(session, mine, first):
            results = [first]
            while not all(chat.done() for chat in chats):
                results.append(await caption(session, mine[len(results) % len(mine)]))
            return results

        results = await asyncio.gather(*map(watch_while_they_talk, sessions, frames, firsts))
        said = [await chat for chat in chats]
        assert all(each == said[0] for each in said)
        await asyncio.gather(*(session.close() for session in sessions))
        assert await rig.free_pages() == free
        return results

    # Whether a session is in the middle of a frame when the pages run out is a matter of the machine's pace.
    for _ in range(6):
        watched = rig.run(work())
        results = [result for each in watched for result in each]
        assert all(result.text_tokens <= BUDGET for result in results)
        for mine, each in zip(frames, watched, strict=True):
            shown = [mine[number % len(mine)] for number in range(len(each))]
            assert [result.caption for result in each] == with_restarts(rig, shown, each)
        if any(result.restarted for result in results):
            break
    assert any(result.restarted for result in results)


def test_closed_in_the_middle_of_a_frame(rig):
    async def work():
        free = await rig.free_pages()
        for number in range(12):
            session = await rig.live.open(replace(rig.settings, stop_bias=0.01, max_frame_tokens=40))
            await caption(session, frames_of(0, 2)[0])
            watching = asyncio.create_task(caption(session, frames_of(0, 2)[1]))
            await asyncio.sleep(0.004 * number)
            if number % 2:
                watching.cancel()
            await session.close()
            await asyncio.gather(watching, return_exceptions=True)
            await session.close()
        assert await rig.free_pages() == free
        assert not rig.engine.output_processor.request_states

    rig.run(work())


def test_a_frame_given_up_is_not_part_of_the_session(rig):
    async def work():
        session = await rig.live.open(rig.settings)
        await caption(session, frames_of(0, 2)[0])
        watching = session.caption(frames_of(3, 1)[0], 0.5)
        await anext(watching)
        await watching.aclose()
        result = await caption(session, frames_of(0, 2)[1])
        await session.close()
        assert result.restarted
        assert len(session.transcript.entries) == 2

    rig.run(work())


def test_what_cannot_be_is_refused(rig):
    async def work():
        with pytest.raises(InputError, match="max-model-len"):
            await rig.live.open(replace(rig.settings, text_budget=1000))
        session = await rig.live.open(rig.settings)
        with pytest.raises(InputError):
            await caption(session, Image.new("RGB", (1, 300)))
        assert (await caption(session, frames_of(0, 1)[0])).caption
        await session.close()
        with pytest.raises(InputError, match="closed"):
            await caption(session, frames_of(0, 1)[0])

    rig.run(work())


def test_strangers_cannot_send_a_state(rig):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    async def work():
        params = SamplingParams(max_tokens=2, extra_args={"casa_live": {"recent": "x"}})
        with pytest.raises(VLLMValidationError, match="live session"):
            async for _ in rig.engine.generate({"prompt": "a"}, params, "stranger"):
                pass
        await rig.chat()

    rig.run(work())
