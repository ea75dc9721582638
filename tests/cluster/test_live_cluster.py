"""Live sessions on a real cluster of two nodes: what they say, and what becomes of them when a replica goes."""

import asyncio
import os
import re
import signal
import struct
from contextlib import AsyncExitStack

import httpx
import numpy as np
import pytest
import ray
import torch
from PIL import Image
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from casa_digits.cases import draw_video
from casa_engine.checkpoints import load_model
from casa_engine.digits import checkpoint_path
from casa_engine.live import LiveSettings
from casa_engine.live.eager_stream import EagerStream
from casa_engine.live.stream_format import StreamFormat
from casa_serving.live.client import LiveClient
from casa_serving.live.protocol import LiveError
from image_files import encoded
from live_messages import rest, take
from waiting import until

# Slow: sessions on a cluster of two nodes take minutes.
pytestmark = [pytest.mark.vllm, pytest.mark.slow]
CREATE = '{"type": "session.create"}'
NUM_FRAMES = 24


@pytest.fixture
def two(cluster):
    """The cluster with both its replicas, before a test and after it, whatever that deploys or deletes."""
    until(lambda: len(cluster.replicas()) == 2, 180)
    config = cluster.config
    yield cluster
    if cluster.config != config:
        cluster.deploy(config)
        until(lambda: len(cluster.replicas()) == 2, 180)


@pytest.fixture(scope="module")
def videos():
    """Two videos of held-out digits as image files, and what the eager model says to each frame."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, format = load_model(checkpoint_path()), StreamFormat.from_checkpoint(checkpoint_path())
    found = []
    for seed in (1, 2):
        frames = [Image.fromarray(frame) for frame in draw_video(np.random.default_rng(seed), NUM_FRAMES).frames]
        stream = EagerStream(model, format, LiveSettings.for_checkpoint(checkpoint_path()))
        found.append(([encoded(frame) for frame in frames], [stream.caption(frame) for frame in frames]))
    torch.set_num_threads(threads)
    return found


def home(client):
    """The replica that a client's session is on."""
    return client._socket.response.headers["x-casa-replica"]


async def caption(client, file, timestamp):
    await client.send_frame(file, timestamp)
    return (await take(client, "frame.done")).caption


async def watch(client, files):
    """Caption frames one by one; return what was said to each."""
    await client.create()
    captions = [await caption(client, file, number / 2) for number, file in enumerate(files)]
    statistics = await client.stop()
    assert statistics.frames == statistics.captioned + statistics.silent == len(files)
    return captions


async def test_sessions_on_both_replicas_say_what_the_eager_model_says(two, videos):
    async with LiveClient(two.live_url) as first, LiveClient(two.live_url) as second:
        assert {home(first), home(second)} == set(two.replicas())
        said = await asyncio.gather(watch(first, videos[0][0]), watch(second, videos[1][0]))
    assert said == [wanted for _, wanted in videos]
    assert sum(map(bool, said[0])) >= 3


async def test_a_question_and_a_stop(two, videos):
    async with LiveClient(two.live_url) as client:
        await client.create()
        first = await caption(client, videos[0][0][0], 0.0)
        await client.ask("What did you read first?", id="mine")
        answer = await take(client, "answer.done")
        assert (answer.id, answer.text) == ("mine", first)
        await client.stop()
        assert (client._socket.close_code, client._socket.close_reason) == (1000, "stopped")


async def test_a_session_joins_the_requests_of_its_name(two):
    for name in ("one", "two", "three"):
        headers = {"x-session-id": f"live {name}"}
        body = {"model": "casa-tiny-digits", "messages": [{"role": "user", "content": "ok"}], "max_tokens": 1}
        answer = httpx.post(f"{two.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        async with connect(two.live_url, additional_headers=headers) as socket:
            assert socket.response.headers["x-casa-replica"] == answer.headers["x-casa-replica"]
            assert socket.response.headers["x-casa-session"] == "kept"


async def test_frames_of_megabytes(two):
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8)
    file = encoded(Image.fromarray(noise))
    assert len(file) > 5_000_000
    async with LiveClient(two.live_url) as client:
        await client.create()
        await caption(client, file, 0.0)


async def test_faults_are_answered_as_by_casa_serve(two):
    async with connect(two.live_url, subprotocols=["casa-live"]) as socket:
        assert socket.subprotocol == "casa-live"
        await socket.send('{"type": "question", "text": "Hi"}')
        assert '"no_session"' in await socket.recv()
        await socket.send(CREATE)
        assert '"session.created"' in await socket.recv()
        await socket.send(struct.pack("<d", 0.0) + b"garbage")
        assert '"bad_frame"' in await socket.recv()
        await socket.send(bytes(17_000_000))
        await rest(socket)
        assert socket.close_code == 1009


async def test_pages_of_other_origins_are_refused_and_the_page_is_there(two):
    with pytest.raises(InvalidStatus) as refused:
        await connect(two.live_url, origin="http://evil.example")
    assert refused.value.response.status_code == 403
    async with connect(two.live_url, origin=two.url):
        pass
    page = httpx.get(two.url)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def sessions_held(cluster):
    """Live sessions as the metrics of all nodes have them."""
    found = re.findall(r"^ray_casa_live_sessions\{.*\} (\S+)$", cluster.metrics(), re.MULTILINE)
    return sum(map(float, found)) if found else None


async def test_clients_that_vanish_leave_nothing_behind(two, videos):
    async def vanish(seed):
        socket = await connect(two.live_url)
        await socket.send(CREATE)
        await socket.recv()
        await socket.send(struct.pack("<d", 0.0) + videos[0][0][0])
        await asyncio.sleep(np.random.default_rng(seed).uniform(0, 0.1))
        socket.transport.abort()

    for seed in range(20):
        await vanish(seed)
    await asyncio.to_thread(until, lambda: sessions_held(two) == 0, 60)
    # Every place is free again.
    sockets = [await connect(two.live_url) for _ in range(16)]
    async with connect(two.live_url) as one_more:
        (refused,), close_code = await rest(one_more)
        assert (refused["code"], close_code) == ("too_many_sessions", 1008)
    await asyncio.gather(*(socket.close() for socket in sockets))


async def resumes(client, file):
    """Reconnects, as soon as it can be, and shows a frame; returns what is said of it."""
    before = list(client.history)
    async with asyncio.timeout(120):
        while True:
            try:
                await client.reconnect()
                break
            # While a new ingress starts there is nobody to ask.
            except (OSError, LiveError, InvalidStatus):
                await asyncio.sleep(0.5)
        assert list(client.history) == before
        await client.send_frame(file, 9.0)
        return await take(client, "frame.done")


async def test_a_killed_replica_is_told_and_the_session_goes_on(two, videos):
    files, wanted = videos[0]
    async with LiveClient(two.live_url) as client:
        await client.create()
        assert await caption(client, files[0], 0.0) == wanted[0]
        gone = home(client)
        os.kill(two.replicas()[gone]["pid"], signal.SIGKILL)
        fault = await take(client, "error")
        assert (fault.code, fault.fatal) == ("engine_error", True)
        await client._reader
        assert client._socket.close_code == 1011
        done = await resumes(client, files[1])
        assert home(client) != gone
        await client.stop()
    # What was said before has been read again.
    async with LiveClient(two.live_url) as client:
        await client.create()
        await client.send_frame(files[1], 0.0)
        alone = await take(client, "frame.done")
    assert done.text_tokens - done.num_tokens > alone.text_tokens - alone.num_tokens
    await asyncio.to_thread(until, lambda: len(set(two.replicas()) - {gone}) == 2, 120)


async def is_told(client):
    """Wait for the good-bye of a replica that leaves."""
    assert (await take(client, "session.closed")).reason == "server is shutting down"
    await client._reader
    assert (client._socket.close_code, client._socket.close_reason) == (1012, "server is shutting down")


def follows_sessions(config):
    """The configuration with a number of replicas that follows that of live sessions."""
    replicas = config["replicas"] | {"min": 1, "target_live_sessions": 1, "upscale_delay_s": 1, "downscale_delay_s": 4}
    return config | {"replicas": replicas}


async def test_a_new_version_tells_the_sessions(two, videos):
    files, wanted = videos[0]
    config = follows_sessions(two.config)
    async with LiveClient(two.live_url) as first, LiveClient(two.live_url) as second:
        assert home(first) != home(second)
        for client in (first, second):
            await client.create()
            assert await caption(client, files[0], 0.0) == wanted[0]
        deploying = asyncio.create_task(asyncio.to_thread(two.deploy, config))
        await asyncio.gather(is_told(first), is_told(second))
        await resumes(first, files[1])
        await deploying


def node_of_the_driver():
    """The head node, whose replica Ray stops last."""
    return next(node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"])


async def go_on_until(condition, clients, file, timeout_s):
    """Show frames, so that no session falls silent, until something is true."""
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(condition):
            for client in clients:
                await caption(client, file, 0.0)
            await asyncio.sleep(1)


@pytest.mark.timeout(600)
async def test_sessions_scale_up_and_scaling_down_tells_them(two, videos):
    files, wanted = videos[0]
    await asyncio.to_thread(two.deploy, follows_sessions(two.config))
    async with AsyncExitStack() as opened:

        async def open_one():
            client = await opened.enter_async_context(LiveClient(two.live_url))
            await client.create()
            return client

        clients = [await open_one(), await open_one()]
        # A replica takes a minute to start on a busy machine.
        await go_on_until(lambda: len(two.replicas()) == 2, clients, files[0], 240)
        clients.append(await open_one())
        replicas = two.replicas()
        assert {home(client) for client in clients} == set(replicas)
        head = node_of_the_driver()
        (stays,) = (name for name, replica in replicas.items() if replica["node_id"] == head)
        leaving = next(client for client in clients if home(client) != stays)
        await caption(leaving, files[0], 0.0)
        assert leaving.history[0]["caption"] == wanted[0]
        for client in clients:
            if client is not leaving:
                await client.stop()
        async with asyncio.timeout(60):
            await is_told(leaving)
        await resumes(leaving, files[1])
        assert home(leaving) == stays
        await go_on_until(lambda: set(two.replicas()) == {stays}, [leaving], files[1], 60)


async def test_sessions_are_told_when_the_application_is_deleted(two):
    async with LiveClient(two.live_url) as client:
        await client.create()
        deleting = asyncio.create_task(asyncio.to_thread(two.delete))
        await is_told(client)
        await deleting
