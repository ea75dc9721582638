"""One connection of `/v1/live`, with an engine that does what a test tells it: order, limits, ends."""

import asyncio
import json
import struct
from urllib.parse import urlsplit

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import ValidationError
from websockets.asyncio.client import connect

from casa_serving.live import tracing
from casa_serving.live.client import ConnectionLostError, LiveClient
from casa_serving.live.protocol import LiveError, read_event
from image_files import encoded, plain
from live_messages import rest, take
from scripted_live import scripted_server
from waiting import soon


def frame(width=28, height=28, timestamp=0.0):
    """Return a binary message."""
    return struct.pack("<d", timestamp) + encoded(plain(width, height))


def picture(width=28, height=28):
    """Return an image file."""
    return encoded(plain(width, height))


async def test_a_session_from_create_to_stop():
    async with scripted_server() as server, LiveClient(server.url) as client:
        created = await client.create(fps=4, instruction="Look.")
        assert created.settings["fps"] == 4
        assert created.settings["text_budget"] == 512
        assert created.limits.max_sessions == 8
        assert await client.send_frame(picture(28, 56), 0.5) == 0
        done = await take(client, "frame.done")
        assert (done.frame, done.timestamp, done.caption, done.image_pages) == (0, 0.5, "28 56", 2)
        assert 0 <= done.queue_ms <= done.delay_ms
        assert await client.ask("Is it?", id="q") == "q"
        answer = await take(client, "answer.done")
        assert (answer.question, answer.id, answer.text) == (0, "q", "yes")
        await client.send_frame(picture(56, 28), 1.0)
        statistics = await client.stop()
        assert [e.type for e in [event async for event in client.events()]] == [
            "caption.delta",
            "caption.delta",
            "frame.done",
            "session.closed",
        ]
        assert (statistics.frames, statistics.captioned, statistics.questions, statistics.tokens) == (2, 2, 1, 6)
        assert statistics.delay_ms.p50 is not None
        assert list(client.history) == [
            {"caption": "28 56", "timestamp": 0.5},
            {"question": "Is it?", "answer": "yes"},
            {"caption": "56 28", "timestamp": 1.0},
        ]
        await soon(lambda: server.metric("casa:live_sessions") == 0)
        assert server.engine.sessions[0].is_closed
        assert server.metric("casa:live_frames_total", result="captioned") == 2


async def test_frames_are_dropped_and_never_queued():
    async with scripted_server() as server, LiveClient(server.url) as client:
        await client.create()
        server.engine.gate.clear()
        await client.send_frame(picture(), 0.0)
        await take(client, "caption.delta")
        for number in range(1, 20):
            await client.send_frame(picture(), number / 2)
        dropped = [await take(client, "frame.dropped") for _ in range(18)]
        server.engine.gate.set()
        statistics = await client.stop()
        assert [(event.frame, event.replaced_by) for event in dropped] == [(n, n + 1) for n in range(1, 19)]
        done = [event.frame async for event in client.events() if event.type == "frame.done"]
        assert done == [0, 19]
        assert (statistics.frames, statistics.captioned, statistics.dropped) == (20, 2, 18)


async def test_questions_go_before_the_waiting_frame_and_only_four_wait():
    async with scripted_server() as server, LiveClient(server.url) as client:
        await client.create()
        server.engine.gate.clear()
        await client.send_frame(picture(), 0.0)
        await take(client, "caption.delta")
        await client.send_frame(picture(), 0.5)
        for number in range(5):
            await client.ask("What?", id=str(number))
        refused = await take(client, "error")
        assert (refused.code, refused.id, refused.fatal) == ("bad_message", "4", False)
        server.engine.gate.set()
        await client.stop()
        ends = [event.type async for event in client.events() if event.type.endswith(".done")]
        assert ends == ["frame.done", *["answer.done"] * 4, "frame.done"]


REFUSED_QUESTIONS = {
    "special tokens": {"text": "<bad>"},
    "no text": {},
    "long text": {"text": "x" * 3000},
    "lone surrogate": {"text": "\ud800"},
    "unknown field": {"text": "Hi", "colour": 1},
}


@pytest.mark.parametrize("fields", REFUSED_QUESTIONS.values(), ids=REFUSED_QUESTIONS)
async def test_the_error_of_a_refused_question_has_its_id(fields):
    async with scripted_server() as server, connect(server.url) as socket:
        question = json.dumps({"type": "question", "id": "mine"} | fields)
        await socket.send('{"type": "question", "text": "Before the session?", "id": "early"}')
        assert json.loads(await socket.recv())["id"] == "early"
        await socket.send('{"type": "session.create"}')
        await socket.recv()
        await socket.send(question)
        refused = json.loads(await socket.recv())
        assert (refused["type"], refused["code"], refused["id"]) == ("error", "bad_message", "mine")


async def test_an_id_that_is_none_is_not_echoed():
    async with scripted_server() as server, connect(server.url) as socket:
        await socket.send('{"type": "session.create"}')
        await socket.recv()
        for bad in (5, "\ud800", "x" * 300):
            await socket.send(json.dumps({"type": "question", "text": "Hi", "id": bad}))
            refused = json.loads(await socket.recv())
            assert (refused["type"], refused["code"], refused["id"]) == ("error", "bad_message", None)


BAD_MESSAGES = {
    "no json": ("hello", "bad_message", "must be JSON"),
    "deep json": ("[" * 100_000, "bad_message", "must be JSON"),
    "a list": ("[1]", "bad_message", "expected one of: session.create"),
    "unknown type": ('{"type": "session.pause"}', "bad_message", "session.pause"),
    "type of another type": ('{"type": ["session.stop"]}', "bad_message", "expected one of"),
    "unknown field": ('{"type": "question", "text": "Hi", "colour": 1}', "bad_message", "'colour' is unknown"),
    "no text": ('{"type": "question"}', "bad_message", "'text' is missing"),
    "empty text": ('{"type": "question", "text": ""}', "bad_message", "at least 1 character"),
    "long text": (json.dumps({"type": "question", "text": "x" * 3000}), "bad_message", "at most 2000"),
    "two megabytes": (json.dumps({"type": "question", "text": "x" * 2_000_000}), "bad_message", "too long"),
    "create again": ('{"type": "session.create"}', "already_created", "one connection is one session"),
    "special tokens": ('{"type": "question", "text": "<bad>"}', "bad_message", "special token"),
    "garbage frame": (struct.pack("<d", 1.0) + b"garbage", "bad_frame", "neither JPEG, PNG nor WebP"),
    "cut frame": (frame()[:60], "bad_frame", "damaged or cut off"),
    "no image": (struct.pack("<d", 1.0), "bad_frame", "too short"),
    "empty frame": (b"", "bad_frame", "got 0 bytes"),
    "no time": (frame(timestamp=float("nan")), "bad_frame", "timestamp is nan"),
    "large frame": (frame() + bytes(100_000), "frame_too_large", "--live-max-frame-bytes"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
async def test_a_bad_message_in_a_session_is_refused_and_the_session_goes_on(name):
    message, code, words = BAD_MESSAGES[name]
    async with scripted_server(max_frame_bytes=100_000) as server, connect(server.url) as socket:
        await socket.send('{"type": "session.create"}')
        assert json.loads(await socket.recv())["type"] == "session.created"
        await socket.send(message)
        refused = json.loads(await socket.recv())
        assert (refused["type"], refused["code"], refused["fatal"]) == ("error", code, False)
        assert words in refused["message"]
        is_frame = isinstance(message, bytes)
        assert refused["frame"] == (0 if is_frame else None)
        await socket.send(frame())
        await socket.send('{"type": "session.stop"}')
        messages, close_code = await rest(socket)
        assert [m["caption"] for m in messages if m["type"] == "frame.done"] == ["28 28"]
        assert messages[-1]["statistics"]["refused"] == int(is_frame)
        assert close_code == 1000


BAD_CREATES = {
    "unknown field": ({"fsp": 2}, "bad_settings", "'fsp' is unknown"),
    "wrong type": ({"fps": "two"}, "bad_settings", "fps"),
    "null": ({"fps": None}, "bad_settings", "fps"),
    "wrong value": ({"fps": -1}, "bad_settings", "fps is -1"),
    "too large a budget": ({"text_budget": 100_000}, "bad_settings", "--live-text-budget"),
    "bad history": ({"history": [{"caption": 3}]}, "bad_settings", "history"),
}


@pytest.mark.parametrize("name", BAD_CREATES)
async def test_a_bad_create_is_refused_and_a_good_one_taken_after_it(name):
    fields, code, words = BAD_CREATES[name]
    async with scripted_server() as server, LiveClient(server.url) as client:
        with pytest.raises(LiveError, match=words) as refused:
            await client.create(**fields)
        assert refused.value.code == code
        client.history.clear()
        assert (await client.create()).type == "session.created"


async def test_a_history_that_is_too_long():
    """Our own client would have cut it."""
    async with scripted_server() as server, connect(server.url) as socket:
        for length, kind in ((4097, "error"), (4096, "session.created")):
            await socket.send(json.dumps({"type": "session.create", "history": [{"caption": "a"}] * length}))
            answer = json.loads(await socket.recv())
            assert answer["type"] == kind
            assert kind != "error" or (answer["code"] == "bad_settings" and "at most 4096 items" in answer["message"])


async def test_what_only_the_engine_can_see_ends_the_session():
    async with scripted_server() as server, connect(server.url) as socket:
        await socket.send(json.dumps({"type": "session.create", "instruction": "<bad>"}))
        (refused,), close_code = await rest(socket)
        assert (refused["code"], refused["fatal"], close_code) == ("bad_settings", True, 1008)


@pytest.mark.parametrize("message", [frame(), '{"type": "question", "text": "Hi"}', '{"type": "session.stop"}'])
async def test_nothing_goes_before_create(message):
    async with scripted_server() as server, connect(server.url) as socket:
        await socket.send(message)
        refused = json.loads(await socket.recv())
        assert (refused["code"], refused["frame"]) == ("no_session", None)
        await socket.send('{"type": "session.create"}')
        assert json.loads(await socket.recv())["type"] == "session.created"


async def test_a_hundred_clients_vanish_in_the_middle_of_a_frame():
    async with scripted_server(max_sessions=1) as server:
        await asyncio.sleep(0.1)
        tasks_before = len(asyncio.all_tasks())
        for _ in range(100):
            server.engine.gate.clear()
            socket = await connect(server.url)
            await socket.send('{"type": "session.create"}')
            await socket.send(frame())
            await soon(lambda: server.engine.num_in_work == 1)
            await socket.send(frame())
            socket.transport.abort()
            await soon(lambda: server.metric("casa:live_sessions") == 0)
        assert server.engine.num_in_work == 0
        assert all(session.is_closed for session in server.engine.sessions)
        assert len(server.engine.sessions) == 100
        await soon(lambda: len(asyncio.all_tasks()) <= tasks_before)


async def test_a_client_that_never_reads_is_cut_off():
    async with scripted_server(send_timeout=0.5) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(server.url).port)
        writer.write(
            b"GET /v1/live HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        reader._transport.pause_reading()
        no_message = b"\x81\x82\x00\x00\x00\x00{}"  # A masked text frame; each one is answered by an error.
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(40):
                while True:
                    writer.write(no_message * 1000)
                    await writer.drain()
        assert server.metric("casa:live_sessions") == 0
        writer.close()


async def test_a_client_that_sends_nothing():
    async with scripted_server(idle_timeout=0.3, create_timeout=0.3) as server:
        async with connect(server.url) as socket:
            (late,), close_code = await rest(socket)
            assert (late["code"], late["fatal"], close_code) == ("idle_timeout", True, 4000)
        async with connect(server.url) as socket:
            await socket.send('{"type": "session.create"}')
            messages, close_code = await rest(socket)
            assert [m["type"] for m in messages] == ["session.created", "error", "session.closed"]
            assert (messages[1]["code"], messages[2]["reason"], close_code) == ("idle_timeout", "idle", 4000)


async def test_a_slow_engine_is_not_the_clients_silence():
    async with scripted_server(idle_timeout=0.2) as server, LiveClient(server.url) as client:
        await client.create()
        server.engine.gate.clear()
        await client.send_frame(picture(), 0.0)
        await asyncio.sleep(0.5)
        server.engine.gate.set()
        assert (await take(client, "frame.done")).caption == "28 28"


async def test_one_session_too_many():
    async with scripted_server(max_sessions=2) as server:
        async with LiveClient(server.url) as first, LiveClient(server.url) as second:
            await first.create()
            await second.create()
            async with connect(server.url) as third:
                (refused,), close_code = await rest(third)
                assert (refused["code"], refused["fatal"], close_code) == ("too_many_sessions", True, 1008)
            async with LiveClient(server.url) as third:
                await third._reader
                with pytest.raises(LiveError, match="All places are taken") as told:
                    await third.create()
                assert told.value.code == "too_many_sessions"
            await first.stop()
        async with LiveClient(server.url) as client:
            await client.create()


async def test_sessions_share_the_memory_of_the_engine():
    async with scripted_server() as server, LiveClient(server.url) as client, connect(server.url) as second:
        server.engine.places = 1000
        await client.create(text_budget=500)
        await second.send('{"type": "session.create", "text_budget": 512}')
        (refused,), close_code = await rest(second)
        assert (refused["code"], close_code) == ("too_many_sessions", 1008)
        assert "100%" in refused["message"] and "50%" in refused["message"]
        async with LiveClient(server.url) as small:
            await small.create(text_budget=400)
            await client.stop()
            async with LiveClient(server.url) as third:
                await third.create(text_budget=500)


async def test_a_frame_that_only_the_engine_can_refuse():
    async with scripted_server() as server, LiveClient(server.url) as client:
        await client.create()
        await client.send_frame(picture(17, 28), 0.0)
        refused = await take(client, "error")
        assert (refused.code, refused.frame, refused.fatal) == ("bad_frame", 0, False)
        await client.send_frame(picture(28, 28), 0.5)
        assert (await take(client, "frame.done")).caption == "28 28"


async def test_a_refused_question_leaves_the_history_right():
    async with scripted_server() as server, LiveClient(server.url) as client:
        await client.create()
        await client.ask("<bad>")
        assert (await take(client, "error")).code == "bad_message"
        await client.ask("Is it?")
        await take(client, "answer.done")
        assert list(client.history) == [{"question": "Is it?", "answer": "yes"}]


def test_a_client_passes_over_what_a_later_server_may_send():
    assert read_event('{"type": "weather", "rain": true}') is None
    with pytest.raises(ValidationError):
        read_event('{"type": "frame.done"}')


async def test_a_fault_of_the_engine_ends_one_session():
    async with scripted_server() as server, LiveClient(server.url) as neighbour, connect(server.url) as socket:
        await neighbour.create()
        await socket.send('{"type": "session.create"}')
        await socket.send(frame(width=13))
        messages, close_code = await rest(socket)
        assert (messages[-2]["code"], messages[-1]["type"], close_code) == ("engine_error", "session.closed", 1011)
        assert "dead" not in messages[-2]["message"]
        await neighbour.send_frame(picture(), 0.0)
        assert (await take(neighbour, "frame.done")).caption == "28 28"


@pytest.fixture
def spans(monkeypatch):
    """The spans that end in this process, in the order of their ends."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing.trace, "get_tracer", provider.get_tracer)
    return exporter.get_finished_spans


@pytest.mark.parametrize("ends", ["engine fails", "client leaves"])
async def test_what_has_no_result_at_the_end_has_a_span_all_the_same(spans, ends):
    """A frame in work, one that waits and a question; what has had its result has one span and no more."""
    async with scripted_server() as server, connect(server.url) as socket:
        await socket.send('{"type": "session.create"}')
        await socket.send(frame())
        while json.loads(await socket.recv())["type"] != "frame.done":
            pass
        server.engine.gate.clear()
        await socket.send(frame(width=13))
        await soon(lambda: server.engine.num_in_work == 1)
        await socket.send(frame())
        await socket.send('{"type": "question", "text": "Is it?"}')
        await socket.send("no message")
        while json.loads(await socket.recv())["type"] != "error":
            pass
        if ends == "engine fails":
            server.engine.gate.set()
            await rest(socket)
        else:
            await socket.close()
        await soon(lambda: spans() and spans()[-1].name == "live_session")
    done, *unfinished, session = spans()
    assert done.attributes["casa.live.result"] == "captioned"
    names = ("casa.live.number", "casa.live.result")
    found = [(span.name, *(span.attributes[name] for name in names)) for span in unfinished]
    result = "failed" if ends == "engine fails" else "abandoned"
    assert found == [("live_frame", 1, result), ("live_question", 0, result), ("live_frame", 2, result)]
    has_failed = ends == "engine fails"
    assert [span.status.is_ok for span in (*unfinished, session)] == [not has_failed] * 4
    assert all(span.parent.span_id == session.context.span_id for span in unfinished)
    assert all(span.end_time <= session.end_time for span in unfinished)


async def test_every_session_is_told_when_the_server_ends():
    async with scripted_server() as server, connect(server.url) as busy, connect(server.url) as waiting:
        await busy.send('{"type": "session.create"}')
        server.engine.gate.clear()
        await busy.send(frame())
        await soon(lambda: server.engine.num_in_work == 1)
        await server.slots.close(5)
        messages, close_code = await rest(busy)
        assert (messages[-1]["type"], messages[-1]["reason"]) == ("session.closed", "server is shutting down")
        assert close_code == 1012
        # Without a session there is no message that could end it.
        assert await rest(waiting) == ([], 1012)
        assert server.engine.sessions[0].is_closed
        assert server.engine.num_in_work == 0


async def test_a_broken_connection_is_resumed_from_text():
    async with scripted_server() as server, LiveClient(server.url) as client:
        await client.create(fps=3)
        await client.send_frame(picture(28, 56), 0.5)
        await take(client, "frame.done")
        client._socket.transport.abort()
        with pytest.raises(ConnectionLostError):
            await take(client, "frame.done")
        created = await client.reconnect()
        assert created.settings["fps"] == 3
        (item,) = server.engine.histories[1]
        assert (item.caption, item.timestamp) == ("28 56", 0.5)
        await client.send_frame(picture(), 1.0)
        assert (await take(client, "frame.done")).frame == 0
