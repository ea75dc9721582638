"""A connection that is lost without a word: nothing closes, nothing comes any more."""

import io
from urllib.parse import urlsplit

import pytest
from PIL import Image
from playwright.sync_api import expect

from live_page import (
    NOTE_WHAT_IS_TOLD,
    SENT,
    Line,
    ask,
    begin_clip,
    finished_captions,
    give_key,
    transcript,
    wait_until,
)
from tcp_relay import tcp_relay

# What the page waits for 20 s or more is a fifth of that.
SHORTEN_LONG_TIMERS = """(() => {
    const begin = setTimeout;
    window.setTimeout = (action, ms, ...rest) => begin(action, ms < 20000 ? ms : ms / 5, ...rest);
})()"""


@pytest.fixture
def relay(server):
    with tcp_relay(urlsplit(server.url).port) as opened:
        yield opened


@pytest.fixture
def page(open_page, relay):
    with open_page(url=f"http://127.0.0.1:{relay.port}") as opened:
        opened.evaluate(SHORTEN_LONG_TIMERS)
        yield opened


@pytest.mark.vllm
def test_a_silent_connection_is_taken_up_like_a_lost_one(page, relay):
    begin_clip(page)
    before = finished_captions(page)
    page.evaluate(NOTE_WHAT_IS_TOLD)
    relay.silence()
    wait_until(page, "told.length > 0")
    assert page.evaluate("told")[0].startswith("The connection was lost. Your captions are kept")
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    expect(page.locator("#problem")).to_be_hidden()
    wait_until(page, f"captions.querySelectorAll('li').length > {len(before)}")
    assert transcript(page)[: len(before)] == before


@pytest.mark.vllm
def test_a_server_that_accepts_and_says_nothing_is_told_so(page, relay):
    begin_clip(page)
    page.click("#stop")
    expect(page.locator("#status")).to_contain_text("Session ended: ")
    relay.silence()
    relay.is_silent = True
    page.click("#reconnect")
    expect(page.locator("#problem")).to_contain_text("The server cannot be reached.")
    relay.is_silent = False  # The page tries again by itself.
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    expect(page.locator("#problem")).to_be_hidden()


@pytest.mark.vllm
def test_a_session_that_is_silent_when_stopped_is_stopped(page, relay):
    begin_clip(page)
    page.wait_for_selector("#captions li")
    relay.silence()
    page.click("#stop")
    expect(page.locator("#status")).to_have_text("Stopping…")
    expect(page.locator("#status")).to_have_text("Stopped")
    expect(page.locator("#problem")).to_be_hidden()


@pytest.mark.vllm
def test_only_what_is_owed_is_missed(page):
    line = Line(page)
    begin_clip(page)
    page.wait_for_selector("#captions li")
    page.evaluate(NOTE_WHAT_IS_TOLD)
    # A paused video: the server owes no word, and the session stays.
    page.evaluate("video.pause()")
    connected = len(line.sockets)
    page.wait_for_timeout(6000)
    assert (len(line.sockets), page.evaluate("told")) == (connected, [])
    # An answer that never comes, whatever comes beside it.
    line.hold("answer.")
    ask(page, "Read the digits.")
    line.wait_for(lambda: any(isinstance(message, dict) and message["type"] == "question" for message in line.sent))
    sent = page.evaluate(SENT)
    page.evaluate("video.currentTime = 20.5")
    wait_until(page, f"{SENT} > {sent}")
    wait_until(page, "told.length > 0")
    assert page.evaluate("told")[0].startswith("The connection was lost. Your captions are kept")
    # The question is not lost: it is where it was typed.
    expect(page.locator("#question")).to_have_value("Read the digits.")
    expect(page.locator("html")).to_have_attribute("data-phase", "live")


@pytest.mark.vllm
def test_an_answer_that_never_comes_is_told_so(page, relay):
    file = io.BytesIO()
    Image.new("RGB", (56, 56), "navy").save(file, "PNG")
    page.set_input_files("#image-file", {"name": "navy.png", "mimeType": "image/png", "buffer": file.getvalue()})
    ask(page, "How many digits are there?")
    give_key(page)
    expect(page.locator("#ask")).to_be_enabled()
    relay.silence()
    relay.is_silent = True
    ask(page, "Read the digits.")
    expect(page.locator("#problem")).to_have_text("The server cannot be reached. Ask again in a moment.")
    expect(page.locator("#ask")).to_be_enabled()
    expect(page.locator("#question")).to_have_value("Read the digits.")
    expect(page.locator("#question-hint")).to_have_text("“Read the digits.” was not answered. Ask it again.")
