"""Live sessions between a client, an ingress and replicas: real sockets, no Ray, an engine that follows a script."""

import asyncio
import gc
import json
import struct
from urllib.parse import urlsplit

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from casa_serving.cluster.live import placement, proxy, replica_server
from casa_serving.cluster.live.session_ticket import TOKEN_HEADER, SessionRejection
from casa_serving.live import tracing
from casa_serving.live.client import LiveClient
from image_files import encoded, plain
from live_messages import rest, take
from live_replicas import ingress_over
from waiting import soon

CREATE = '{"type": "session.create"}'


def frame(width=28, height=28, timestamp=0.0):
    """Return a binary message."""
    return struct.pack("<d", timestamp) + encoded(plain(width, height))


async def nothing_is_held(ingress):
    """Wait until no session is left on either side."""
    await soon(lambda: ingress.sessions == 0)
    await soon(lambda: not any(replica.server.num_sessions for replica in ingress.replicas))
    for replica in ingress.replicas:
        assert replica.engine.num_in_work == 0
        assert all(session.is_closed for session in replica.engine.sessions)


async def test_a_session_goes_through_from_create_to_stop():
    async with ingress_over("a") as ingress:
        async with LiveClient(ingress.url) as client:
            created = await client.create(fps=4)
            assert (created.settings["fps"], created.limits.max_sessions) == (4, 8)
            await client.send_frame(encoded(plain(28, 56)), 0.5)
            done = await take(client, "frame.done")
            assert (done.frame, done.timestamp, done.caption) == (0, 0.5, "28 56")
            await client.ask("Is it?", id="q")
            assert (await take(client, "answer.done")).text == "yes"
            assert ingress.replicas[0].server.num_sessions == 1
            statistics = await client.stop()
            assert (statistics.frames, statistics.questions) == (1, 1)
            assert (client._socket.close_code, client._socket.close_reason) == (1000, "stopped")
        await nothing_is_held(ingress)
        assert ingress.replicas[0].server.frames.sample() == (1, 0)


async def test_late_and_dropped_frames_count_for_the_last_seconds(monkeypatch):
    async with ingress_over("a") as ingress:
        replica = ingress.replicas[0]
        async with LiveClient(ingress.url) as client:
            await client.create(fps=240)
            replica.engine.gate.clear()
            await client.send_frame(encoded(plain()), 0.0)
            await take(client, "caption.delta")
            for number in (1, 2):
                await client.send_frame(encoded(plain()), number / 2)
            assert (await take(client, "frame.dropped")).frame == 1
            await asyncio.sleep(0.1)
            replica.engine.gate.set()
            await client.stop()
        assert replica.server.frames.sample() == (3, 3)
        # They are forgotten when the window has passed.
        monkeypatch.setattr(replica_server, "WINDOW_S", 0.0)
        assert replica.server.frames.sample() == (0, 0)


async def test_the_subprotocol_and_the_replicas_name_come_with_the_handshake():
    async with ingress_over("a") as ingress:
        async with connect(ingress.url, subprotocols=["other", "casa-live"]) as socket:
            assert socket.subprotocol == "casa-live"
            assert socket.response.headers["x-casa-replica"] == "a"
        async with connect(ingress.url) as socket:
            assert socket.subprotocol is None


async def test_a_session_that_the_engine_ends_is_an_error_in_the_clients_trace(monkeypatch):
    """Through the ingress: the span is the child of the client's; one that the client ends is no error."""
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(tracing.trace, "get_tracer", provider.get_tracer)
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace_id}-{parent_id}-01", "tracestate": "vendor=1"}
    async with ingress_over("a") as ingress:
        for fails in (False, True):
            async with connect(ingress.url, additional_headers=headers) as socket:
                await socket.send(CREATE)
                await socket.recv()
                if fails:
                    monkeypatch.setattr(ingress.replicas[0].engine.sessions[-1], "ask", None)
                    await socket.send('{"type": "question", "text": "Is it?"}')
                else:
                    await socket.send('{"type": "session.stop"}')
                await rest(socket)
                assert socket.close_code == (1011 if fails else 1000)
        await nothing_is_held(ingress)
    sessions = [span for span in spans.get_finished_spans() if span.name == "live_session"]
    assert [span.status.status_code for span in sessions] == [StatusCode.UNSET, StatusCode.ERROR]
    for span in sessions:
        assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace_id, parent_id)
        assert span.parent.trace_state.get("vendor") == "1"


async def test_frames_of_megabytes_go_through_and_larger_ones_end_the_session():
    async with ingress_over("a", max_frame_bytes=8_000_000) as ingress:
        async with connect(ingress.url, max_size=None) as socket:
            await socket.send(CREATE)
            assert json.loads(await socket.recv())["limits"]["max_frame_bytes"] == 8_000_000
            await socket.send(frame() + bytes(7_000_000))
            assert json.loads(await socket.recv())["type"] == "caption.delta"
            await socket.send(frame() + bytes(9_000_000))
            while (message := json.loads(await socket.recv()))["type"] != "error":
                pass
            assert (message["code"], message["frame"], message["fatal"]) == ("frame_too_large", 1, False)
            await socket.send(bytes(17_000_000))
            await rest(socket)
            assert socket.close_code == 1009
        await nothing_is_held(ingress)


async def test_fifty_clients_vanish_in_the_middle_of_a_frame():
    async with ingress_over("a", max_sessions=1) as ingress:
        engine = ingress.replicas[0].engine
        await asyncio.sleep(0.1)
        tasks_before = len(asyncio.all_tasks())
        for _ in range(50):
            engine.gate.clear()
            socket = await connect(ingress.url)
            await socket.send(CREATE)
            await socket.send(frame())
            await soon(lambda: engine.num_in_work == 1)
            socket.transport.abort()
            await nothing_is_held(ingress)
        assert len(engine.sessions) == 50
        gc.collect()
        await soon(lambda: len(asyncio.all_tasks()) <= tasks_before)


async def test_a_client_that_never_reads_holds_nothing_for_long(monkeypatch):
    monkeypatch.setattr(proxy, "CLOSE_TIMEOUT_S", 0.5)
    # Each of them is answered by a longer error, which fills all buffers between here and the replica.
    faulty = json.dumps({"type": "question", "text": "?"} | {f"{number}" * 60: 0 for number in range(4)}).encode()
    message = b"\x81\xfe" + struct.pack(">H", len(faulty)) + bytes(4) + faulty
    async with ingress_over("a", send_timeout=0.5) as ingress:
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(ingress.url).port)
        writer.write(
            b"GET /v1/live HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        create = CREATE.encode()
        writer.write(b"\x81" + bytes([0x80 | len(create)]) + bytes(4) + create)
        reader._transport.pause_reading()

        async def flood():
            while True:
                writer.write(message * 100)
                await writer.drain()

        flooding = asyncio.create_task(flood())
        await soon(lambda: ingress.replicas[0].server.num_sessions == 1)
        await soon(lambda: ingress.sessions == 0, 120)
        await nothing_is_held(ingress)
        flooding.cancel()
        writer.transport.abort()


@pytest.mark.parametrize("message", [b"?" * 100_000, "?"])
async def test_a_client_that_is_far_ahead_of_its_replica_is_sent_away(monkeypatch, message):
    monkeypatch.setattr(proxy, "MAX_WAITING_BYTES", 1_000_000)
    monkeypatch.setattr(proxy, "MAX_WAITING_MESSAGES", 100)
    taken = asyncio.Event()

    async def slow(inflow, upstream):
        await taken.wait()

    monkeypatch.setattr(proxy, "relay_to_replica", slow)
    async with ingress_over("a") as ingress:
        async with connect(ingress.url) as socket:
            for _ in range(101):
                await socket.send(message)
            (fault,), close_code = await rest(socket)
            assert (fault["code"], fault["fatal"], close_code) == ("bad_message", True, 1008)
            assert "Too much was sent at once" in fault["message"]
        await nothing_is_held(ingress)


async def test_a_replica_that_dies_is_no_silent_break():
    async with ingress_over("a", "b") as ingress:
        async with LiveClient(ingress.url) as client:
            await client.create()
            await client.send_frame(encoded(plain(28, 56)), 0.5)
            await take(client, "frame.done")
            ingress.replicas[0].die()
            fault = await take(client, "error")
            assert (fault.code, fault.fatal) == ("engine_error", True)
            assert "`history`" in fault.message
            await client._reader
            assert client._socket.close_code == 1011
            del ingress.replicas[0]
            await client.reconnect()
            (item,) = ingress.replicas[0].engine.histories[0]
            assert (item.caption, item.timestamp) == ("28 56", 0.5)
        await nothing_is_held(ingress)


async def test_full_replicas_are_passed_over_and_when_all_are_full_the_client_is_told():
    async with ingress_over("a", "b", max_sessions=1) as ingress:
        async with LiveClient(ingress.url) as first, LiveClient(ingress.url) as second:
            await first.create()
            await second.create()
            assert ingress.asked == ["a", "a", "b"]
            async with connect(ingress.url, subprotocols=["casa-live"]) as third:
                (refused,), close_code = await rest(third)
            assert (refused["code"], refused["fatal"], close_code) == ("too_many_sessions", True, 1008)
            assert "live.max_sessions" in refused["message"]
            await first.stop()
            async with LiveClient(ingress.url) as third:
                await third.create()
        await nothing_is_held(ingress)


async def test_a_replica_that_leaves_tells_its_sessions_and_is_asked_once(monkeypatch):
    drains = []
    post = proxy.post_drain

    async def counted(place):
        drains.append(place.drain_url)
        await post(place)

    monkeypatch.setattr(proxy, "post_drain", counted)
    async with ingress_over("a", "b") as ingress:
        leaving, staying = ingress.replicas
        async with LiveClient(ingress.url) as first, LiveClient(ingress.url) as second:
            await first.create()
            await second.create()
            await first.send_frame(encoded(plain(28, 56)), 0.5)
            await take(first, "frame.done")
            ingress.replicas.remove(leaving)
            # As Ray's router does it.
            await asyncio.to_thread(leaving.leave)
            for client in (first, second):
                closed = await take(client, "session.closed")
                assert closed.reason == "server is shutting down"
                await client._reader
                assert (client._socket.close_code, client._socket.close_reason) == (1012, "server is shutting down")
            assert len(drains) == 1
            await first.reconnect()
            assert [item.caption for item in staying.engine.histories[0]] == ["28 56"]
        await soon(lambda: leaving.server.num_sessions == 0)
        await nothing_is_held(ingress)


async def test_a_replica_that_leaves_without_a_word_is_left():
    async with ingress_over("a") as ingress:
        async with connect(ingress.url) as socket:
            await socket.send(CREATE)
            await socket.recv()
            for server in ingress.replicas[0].server._server.servers:
                server.close()
            ingress.replicas[0].leave()
            (fault,), close_code = await rest(socket)
            assert (fault["code"], close_code) == ("engine_error", 1011)
        await nothing_is_held(ingress)


async def test_a_drained_replica_that_stays_takes_sessions_again():
    async with ingress_over("a") as ingress:
        async with LiveClient(ingress.url) as client:
            await client.create()
            ingress.replicas[0].leave()
            await take(client, "session.closed")
            await client.reconnect()
        await nothing_is_held(ingress)


async def test_a_session_without_a_token_or_with_a_used_one_is_refused():
    async with ingress_over("a") as ingress:
        server = ingress.replicas[0].server
        places = server.reserve_session()
        place = await anext(places)
        async with connect(place.url, additional_headers={TOKEN_HEADER: place.token}):
            for token in ("", "wrong", place.token):
                with pytest.raises(InvalidStatus) as refused:
                    await connect(place.url, additional_headers={TOKEN_HEADER: token})
                assert refused.value.response.status_code == 403
        with pytest.raises(StopAsyncIteration):
            await anext(places)
        with pytest.raises(proxy.aiohttp.ClientResponseError, match="403"):
            await proxy.post_drain(proxy.SessionTicket(place.url, "", place.drain_url, place.token))


async def test_a_place_that_nobody_comes_for_is_free_again(monkeypatch):
    monkeypatch.setattr(replica_server, "CONNECT_TIMEOUT_S", 0.1)
    async with ingress_over("a", max_sessions=1) as ingress:
        server = ingress.replicas[0].server
        places = server.reserve_session()
        await anext(places)
        assert isinstance(await anext(server.reserve_session()), SessionRejection)
        with pytest.raises(StopAsyncIteration):
            await anext(places)
        assert server.num_sessions == 0


async def test_a_call_that_is_cancelled_ends_its_session():
    async with ingress_over("a") as ingress:
        server = ingress.replicas[0].server
        places = server.reserve_session()
        place = await anext(places)
        async with connect(place.url, additional_headers={TOKEN_HEADER: place.token}) as socket:
            await socket.send(CREATE)
            await socket.recv()
            await places.aclose()
            await rest(socket)
        await nothing_is_held(ingress)


@pytest.mark.parametrize(
    ("error", "code", "close_code"),
    [
        (BackPressureError(num_queued_requests=3, max_queued_requests=2), "too_many_sessions", 1008),
        (ActorDiedError(), "engine_error", 1011),
    ],
)
async def test_a_router_that_finds_no_replica(error, code, close_code):
    async with ingress_over("a") as ingress:

        async def ask(context):
            raise error
            yield

        ingress.ask = ask
        async with connect(ingress.url) as socket:
            (fault,), got = await rest(socket)
            assert (fault["code"], fault["fatal"], got) == (code, True, close_code)


async def test_a_router_that_never_answers(monkeypatch):
    monkeypatch.setattr(placement, "PLACEMENT_TIMEOUT_S", 0.1)
    async with ingress_over("a") as ingress:

        async def ask(context):
            await asyncio.sleep(60)
            yield

        ingress.ask = ask
        async with connect(ingress.url) as socket:
            (fault,), close_code = await rest(socket)
            assert (fault["code"], close_code) == ("too_many_sessions", 1008)


async def test_a_replica_that_cannot_be_reached_is_passed_over():
    async with ingress_over("a", "b") as ingress:
        ingress.replicas[0].die()
        async with LiveClient(ingress.url) as client:
            await client.create()
        assert ingress.asked == ["a", "b"]
        await nothing_is_held(ingress)
