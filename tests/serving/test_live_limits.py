"""Keys, origins and limits of `/v1/live`, on a server whose limits are small."""

import asyncio
import base64
import json
import re
import struct
from urllib.parse import urlsplit

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from casa_serving.live.client import LiveClient
from image_files import data_url, encoded, plain
from live_messages import rest, take
from posting import post
from serving_process import casa_serve

pytestmark = pytest.mark.vllm
KEY = "a key: with ~ signs"
HEADERS = {"Authorization": f"Bearer {KEY}"}
CREATE = '{"type": "session.create"}'


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A server with a key and small limits."""
    options = {
        "--api-key": KEY,
        "--allowed-origins": '["http://friend.example"]',
        "--max-model-len": 1024,
        "--live-max-sessions": 2,
        "--live-idle-timeout": 3,
        "--live-create-timeout": 2,
        "--live-send-timeout": 1,
        "--live-max-frame-bytes": 10_000,
        "--max-image-pixels": 40_000,
        "--max-pixels-in-flight": 40_000,
    }
    arguments = [part for option in options.items() for part in option]
    with casa_serve(tmp_path_factory.mktemp("strict") / "log.txt", *arguments, "--enforce-eager") as running:
        yield running


async def all_have_left(server):
    """Wait until the sessions of the tests before have given their places back."""
    async with asyncio.timeout(30):
        while not re.search(r"^casa:live_sessions(?:\{[^}]*\})? 0\.0$", server.get("/metrics"), re.MULTILINE):
            await asyncio.sleep(0.05)


async def test_a_key_is_taken_from_the_header(strict):
    async with LiveClient(strict.live_url, api_key=KEY) as client:
        assert (await client.create()).limits.max_frame_bytes == 10_000
    for key in (None, "wrong"):
        with pytest.raises(InvalidStatus) as refused:
            async with LiveClient(strict.live_url, api_key=key):
                pass
        assert refused.value.response.status_code == 401


async def test_a_key_is_taken_from_a_subprotocol(strict):
    def offer(key):
        return ["casa-live", "casa-key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")]

    async with connect(strict.live_url, subprotocols=offer(KEY)) as socket:
        # The key is never sent back.
        assert socket.subprotocol == "casa-live"
    for wrong in (offer("wrong"), ["casa-live", "casa-key.%%%"], ["casa-live"]):
        with pytest.raises(InvalidStatus) as refused:
            async with connect(strict.live_url, subprotocols=wrong):
                pass
        assert refused.value.response.status_code == 401


async def test_pages_of_other_origins_are_refused(strict):
    own = strict.url
    for origin in (own, "http://friend.example"):
        async with connect(strict.live_url, additional_headers=HEADERS, origin=origin):
            pass
    for origin in ("http://evil.example", "null", own.rsplit(":", 1)[0], own + ".evil.example"):
        with pytest.raises(InvalidStatus) as refused:
            async with connect(strict.live_url, additional_headers=HEADERS, origin=origin):
                pass
        assert refused.value.response.status_code == 403
        assert b"--allowed-origins" in refused.value.response.body


async def test_one_session_too_many_is_told_at_once(strict):
    async with LiveClient(strict.live_url, api_key=KEY) as first, LiveClient(strict.live_url, api_key=KEY) as second:
        await first.create()
        await second.create()
        async with connect(strict.live_url, additional_headers=HEADERS) as third:
            (refused,), close_code = await rest(third)
            assert (refused["code"], refused["fatal"], close_code) == ("too_many_sessions", True, 1008)
        await first.send_frame(encoded(plain()), 0.0)
        assert (await first.stop()).frames == 1
    async with LiveClient(strict.live_url, api_key=KEY) as client:
        await client.create()


async def test_a_session_and_a_chat_share_the_pixels_in_flight(strict):
    async def chat():
        picture = {"type": "image_url", "image_url": {"url": data_url(encoded(plain(150, 150, "red")))}}
        body = {"model": "casa-tiny-digits", "messages": [{"role": "user", "content": [picture]}], "max_tokens": 2}
        return await asyncio.to_thread(post, strict, "/v1/chat/completions", body, **HEADERS)

    await all_have_left(strict)
    async with LiveClient(strict.live_url, api_key=KEY) as client:
        await client.create()
        await client.send_frame(encoded(plain(150, 150)), 0.0)
        assert await take(client, "frame.done")
        status, text = await chat()
        assert status == 429, text
        assert "--max-pixels-in-flight" in json.loads(text)["error"]["message"]
        await client.stop()
    await all_have_left(strict)
    async with asyncio.timeout(30):
        while (await chat())[0] != 200:  # The frame has gone with its session, once nothing refers to either.
            await asyncio.sleep(0.1)


async def test_silence_ends_a_session(strict):
    await all_have_left(strict)
    async with connect(strict.live_url, additional_headers=HEADERS) as socket:
        (late,), close_code = await rest(socket)
        assert (late["code"], close_code) == ("idle_timeout", 4000)
    async with connect(strict.live_url, additional_headers=HEADERS) as socket:
        await socket.send(CREATE)
        messages, close_code = await rest(socket)
        assert [message["type"] for message in messages] == ["session.created", "error", "session.closed"]
        assert (messages[1]["code"], close_code) == ("idle_timeout", 4000)


async def test_a_client_that_never_reads_costs_little_and_is_cut_off(strict):
    address = urlsplit(strict.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    key = f"Authorization: {HEADERS['Authorization']}\r\n".encode()
    writer.write(
        b"GET /v1/live HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        + key
        + b"Sec-WebSocket-Key: "
        b"AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    await reader.readuntil(b"\r\n\r\n")
    create = CREATE.encode()
    writer.write(b"\x81" + bytes([0x80 | len(create)]) + bytes(4) + create)
    reader._transport.pause_reading()
    resident = resident_bytes(strict)
    garbage = b"\x82\x8a" + bytes(4) + struct.pack("<d", 0.0) + b"??"  # A frame; each one is answered by an error.
    with pytest.raises(ConnectionError):
        while True:
            writer.write(garbage * 1000)
            await writer.drain()
            assert resident_bytes(strict) < resident + 30_000_000
    writer.close()
    async with LiveClient(strict.live_url, api_key=KEY) as client:
        await client.create()


def resident_bytes(server):
    """Return the memory of the server's own process."""
    line = next(x for x in server.get("/metrics").splitlines() if x.startswith("process_resident_memory_bytes "))
    return float(line.split()[1])
