"""`casa-eval-digits --base-url` in a live session: whatever answers there, it ends in one sentence."""

import json
import threading
from contextlib import contextmanager

import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

from casa_digits import live_endpoint
from casa_digits.live_endpoint import EndpointError, EndpointStream

FRAME = Image.new("RGB", (28, 28))
CREATED, DONE = {"type": "session.created"}, {"type": "frame.done", "caption": "3"}


@contextmanager
def session_server(*replies, ends=False):
    """Serve sessions that answer each message with the next of `replies`, a list of events or of words.

    Yields:
        Its OpenAI-compatible address, and an event that is set when a client has closed its connection.
    """
    closed = threading.Event()

    def talk(connection):
        try:
            for events in replies:
                connection.recv()
                for event in events:
                    connection.send(event if isinstance(event, str | bytes) else json.dumps(event))
            if not ends:
                connection.recv()
        except ConnectionClosed:
            closed.set()

    with serve(talk, "127.0.0.1", 0, subprotocols=[live_endpoint.SUBPROTOCOL]) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.socket.getsockname()[1]}/v1", closed
        finally:
            server.shutdown()
            thread.join()


def show_a_frame(url):
    with EndpointStream(url) as stream:
        return stream.caption(FRAME)


def test_a_session_as_it_should_be():
    silence = {"type": "frame.done", "caption": ""}
    answer = {"type": "answer.done", "text": "3"}
    with session_server([CREATED], [{"type": "caption.delta"}, DONE], [silence], [answer]) as (url, closed):
        with EndpointStream(url) as stream:
            assert [stream.caption(FRAME), stream.caption(FRAME), stream.ask("What?")] == ["3", "", "3"]
            assert stream.captions == ["3"]
        assert closed.wait(10)


REJECTED = {"type": "error", "code": "bad_frame", "message": "the frame is no image.", "fatal": False}


@pytest.mark.parametrize(
    ("replies", "ends", "words"),
    [
        ([[CREATED], [REJECTED]], False, "rejects what it was sent: the frame is no image."),
        ([[CREATED], [{**REJECTED, "fatal": True}]], False, "ended the session: the frame is no image."),
        ([[CREATED], [{"type": "session.closed", "reason": "shutdown"}]], False, "ended the session: shutdown"),
        ([[CREATED]], True, "the connection to ws://"),
        ([[CREATED], []], True, "the connection to ws://"),
        ([[{**REJECTED, "message": "no place left.", "fatal": True}]], False, "ended the session: no place left."),
        ([["<html>"]], False, "is no live session"),
        ([[b"\xff"]], False, "is no live session"),
        ([["[]"]], False, "is no live session"),
        ([["{}"]], False, "is no live session"),
        ([["3"]], False, "is no live session"),
        ([[CREATED], [{"type": "frame.done"}]], False, "is no live session"),
        ([[CREATED], [{"type": "frame.done", "caption": 3}]], False, "is no live session"),
        ([[CREATED], [{"type": "error"}]], False, "is no live session"),
        ([[]], False, "no event within 0.5 s"),
        ([[CREATED], []], False, "no event within 0.5 s"),
    ],
)
def test_what_ends_a_session_is_one_sentence(monkeypatch, replies, ends, words):
    monkeypatch.setattr(live_endpoint, "TIMEOUT_S", 0.5)
    with session_server(*replies, ends=ends) as (url, closed):
        with pytest.raises(EndpointError) as error:
            show_a_frame(url)
        assert words in str(error.value)
        assert url.removeprefix("http") in str(error.value)
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)
        # The client has closed the connection, whatever came.
        assert ends or closed.wait(10)


def test_a_server_without_sessions():
    with pytest.raises(EndpointError, match=r"opens no live session .*--no-live"):
        show_a_frame("http://127.0.0.1:9/v1")
