"""`/v1/live` of a real `casa-serve` with the embedded model, beside chats and beside clients that misbehave."""

import asyncio
import json
import re
import struct
import time

import numpy as np
import pytest
from PIL import Image
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from casa_digits.cases import draw_video
from casa_serving.live.client import LiveClient
from image_files import encoded, plain
from live_messages import take

pytestmark = pytest.mark.vllm
CREATE = '{"type": "session.create"}'


def video(seed, num_frames):
    """Return files of a video of held-out digits, and what there is to read in each."""
    drawn = draw_video(np.random.default_rng(seed), num_frames)
    return [encoded(Image.fromarray(frame)) for frame in drawn.frames], drawn.texts


async def watch(url, files):
    """Caption frames one by one; return the events `frame.done`."""
    seen = []
    async with LiveClient(url) as client:
        await client.create()
        for number, file in enumerate(files):
            await client.send_frame(file, number / 2)
            async for event in client.events():
                assert event.type in ("caption.delta", "frame.done"), event
                if event.type == "frame.done":
                    seen.append(event)
                    break
        statistics = await client.stop()
    assert statistics.frames == statistics.captioned + statistics.silent == len(files)
    return seen


HELD = ("casa:live_sessions", "casa:image_pages_in_use", "vllm:kv_cache_usage_perc", "vllm:num_requests_running")


def wait_until_nothing_is_held(server, good_request):
    """Wait until no session, page or request is left; the engine tells its figures only at a step."""
    deadline = time.monotonic() + 30
    while True:
        good_request()
        held = {name: server.metric(name) for name in HELD}
        if not any(held.values()):
            return
        assert time.monotonic() < deadline, held
        time.sleep(0.2)


async def test_digits_are_captioned_when_they_change(server):
    files, texts = video(1, 24)
    events = await watch(server.live_url, files)
    changes = [number for number in range(24) if number == 0 or texts[number] != texts[number - 1]]
    right = sum(events[number].caption == texts[number] for number in changes)
    assert right >= len(changes) - 1
    assert sum(bool(event.caption) for event in events) <= len(changes) + 2
    assert events[-1].text_tokens > events[0].text_tokens
    # One frame's pages, whichever frame it is.
    assert all(0 < event.image_pages <= 8 for event in events)
    assert all(event.queue_ms <= event.delay_ms for event in events)


async def test_a_question_while_the_video_runs(server):
    files, _ = video(1, 4)
    async with LiveClient(server.live_url) as client:
        await client.create()
        await client.send_frame(files[0], 0.0)
        await take(client, "frame.done")
        await client.send_frame(files[1], 0.5)
        await client.ask("What did you read first?", id="mine")
        await client.stop()
        events = [event async for event in client.events()]
    (answer,) = [event for event in events if event.type == "answer.done"]
    assert (answer.question, answer.id) == (0, "mine")
    assert re.fullmatch(r"\d( \d)*", answer.text)
    assert "".join(event.text for event in events if event.type == "answer.delta").strip() == answer.text


def len_said(event):
    """Return the tokens of a frame's caption without its end."""
    return event.num_tokens - 1


async def test_the_history_is_known_after_a_broken_connection(server):
    files, _ = video(1, 3)
    async with LiveClient(server.live_url) as client:
        await client.create()
        await client.send_frame(files[0], 0.0)
        seen = await take(client, "frame.done")
        client._socket.transport.abort()
        await client._reader
        await client.reconnect()
        await client.send_frame(files[1], 0.5)
        await client.stop()
        (done,) = [event async for event in client.events() if event.type == "frame.done"]
    (alone,) = await watch(server.live_url, files[1:2])
    # What was said before is read again: two delimiters, the caption and its end.
    before = seen.num_tokens + 2
    assert done.text_tokens - len_said(done) == alone.text_tokens - len_said(alone) + before


async def test_frames_of_other_sizes_and_types_in_mid_session(server):
    pictures = [plain(56, 28, "red"), plain(300, 200, "blue"), plain(1, 1), plain(1600, 1200, "green")]
    files = [encoded(picture, kind) for picture in pictures for kind in ("JPEG", "PNG", "WEBP")]
    events = await watch(server.live_url, files)
    assert [event.frame for event in events] == list(range(12))


async def test_broken_frames_are_refused_and_the_session_goes_on(server):
    good = struct.pack("<d", 0.0) + encoded(plain(56, 28))
    bad = [b"garbage", encoded(plain(1, 5000)), bytes(2_000_001), good[8:40]]
    async with connect(server.live_url, max_size=None) as socket:
        await socket.send(CREATE)
        assert json.loads(await socket.recv())["limits"]["max_frame_bytes"] == 2_000_000
        for number, data in enumerate(bad):
            await socket.send(struct.pack("<d", 0.0) + data)
            refused = json.loads(await socket.recv())
            code = "frame_too_large" if len(data) > 2_000_000 else "bad_frame"
            assert (refused["type"], refused["code"], refused["frame"]) == ("error", code, number)
            assert "0x" not in refused["message"] and "PIL" not in refused["message"]
        await socket.send(good)
        assert json.loads(await socket.recv())["type"] in ("caption.delta", "frame.done")


async def test_a_frame_of_30_megabytes_closes_the_connection(server):
    async with connect(server.live_url) as socket:
        await socket.send(CREATE)
        await socket.recv()
        with pytest.raises(ConnectionClosed):
            await socket.send(bytes(30_000_000))
            await socket.recv()
        assert socket.close_code == 1009
    assert await watch(server.live_url, [encoded(plain())])


async def test_twenty_frames_at_once(server):
    async with LiveClient(server.live_url) as client:
        await client.create()
        files, _ = video(2, 20)
        engine = server.engine
        engine.suspend()  # However fast it is, all twenty come before it has read one.
        try:
            for number, file in enumerate(files):
                await client.send_frame(file, number / 2)
            dropped = [await take(client, "frame.dropped") for _ in range(18)]
        finally:
            engine.resume()
        statistics = await client.stop()
        events = [event async for event in client.events()]
    done = [event.frame for event in events if event.type == "frame.done"]
    dropped += [event for event in events if event.type == "frame.dropped"]
    # The last one, and at most one whose turn came while the others were still being read.
    assert done[-1] == 19
    assert len(done) <= 2
    assert [(event.frame, event.replaced_by) for event in dropped] == [(n, n + 1) for n in range(19) if n not in done]
    assert (statistics.frames, statistics.dropped) == (20, len(dropped))


async def vanish(url, seed):
    """Connect, show a frame and be gone in the middle of it, without a word."""
    files, _ = video(3, 1)
    socket = await connect(url)
    await socket.send(CREATE)
    await socket.recv()
    await socket.send(struct.pack("<d", 0.0) + files[0])
    await asyncio.sleep(np.random.default_rng(seed).uniform(0, 0.15))
    socket.transport.abort()


def test_a_hundred_clients_that_vanish_leave_nothing_behind(server, good_request):
    good_request()

    def probe():
        wait_until_nothing_is_held(server, good_request)
        return json.loads(server.get("/probe"))

    async def vanish_often(seeds):
        for seed in seeds:
            await vanish(server.live_url, seed)

    asyncio.run(vanish_often(range(20)))
    before = probe()
    asyncio.run(vanish_often(range(20, 100)))
    after = probe()
    assert after["connections"] == before["connections"] == 0
    assert after["tasks"] <= before["tasks"]
    assert after["rss"] < before["rss"] + 20_000_000


async def test_neighbours_go_on_beside_clients_that_misbehave(server, good_request):
    files, _ = video(4, 16)
    alone = [event.caption for event in await watch(server.live_url, files)]
    expected = good_request()

    async def misbehave():
        for seed in range(10):
            await vanish(server.live_url, seed)
            async with connect(server.live_url) as socket:
                await socket.send(CREATE)
                await socket.send(struct.pack("<d", 0.0) + b"garbage")
                await socket.send("garbage")
                await socket.recv()

    async def chat():
        return [await asyncio.to_thread(good_request) for _ in range(10)]

    first, second, answers, *_ = await asyncio.gather(
        watch(server.live_url, files), watch(server.live_url, files), chat(), misbehave(), misbehave()
    )
    assert [event.caption for event in first] == [event.caption for event in second] == alone
    assert set(answers) == {expected}
    wait_until_nothing_is_held(server, good_request)
