"""What can be looked at besides files: cameras, the screen, a still image; and the captioner's settings."""

import io
import json

import numpy as np
import pytest
from playwright.sync_api import expect

from casa_digits.data import draw_image, load_samples
from live_page import ask, begin_clip, give_key, wait_until

SENT = "Number(document.querySelector('[data-count=sent] dd').textContent)"

# The video is loaded, but the page hears of it only at `release()`.
HOLD_LOADED = """() => {
    video.addEventListener = function (type, listener, options) {
        const held = type === "loadeddata" ? () => (window.release = listener) : listener;
        EventTarget.prototype.addEventListener.call(this, type, held, options);
    };
}"""
# The camera's permission is given at `release()`.
HOLD_CAMERA = """() => {
    const devices = navigator.mediaDevices;
    const open = devices.getUserMedia.bind(devices);
    devices.getUserMedia = async (wanted) => {
        await new Promise((resolve) => (window.release = resolve));
        const stream = await open(wanted);
        [window.track] = stream.getTracks();
        return stream;
    };
}"""


@pytest.fixture
def page(open_page):
    with open_page() as opened:
        yield opened


@pytest.mark.vllm
def test_another_camera_can_be_chosen(page):
    page.click(".invitation [data-action=camera]")
    give_key(page)
    expect(page.locator("#cameras option")).to_have_count(2)
    wait_until(page, f"{SENT} >= 1")
    first = page.evaluate("(window.track = video.srcObject.getTracks()[0]).getSettings().deviceId")
    (other,) = page.evaluate(f"[...cameras.options].map((option) => option.value).filter((id) => id !== '{first}')")
    page.select_option("#cameras", other)
    wait_until(page, f"video.srcObject?.getTracks()[0].getSettings().deviceId === '{other}'")
    expect(page.locator("#cameras")).to_have_value(other)
    assert page.evaluate("track.readyState") == "ended"
    wait_until(page, f"{SENT} >= 1")


@pytest.mark.vllm
def test_the_screen_is_captioned_until_it_is_no_longer_shared(page):
    page.click(".invitation [data-action=screen]")
    give_key(page)
    wait_until(page, f"{SENT} >= 1")
    expect(page.locator("#source-name")).to_have_text("Screen")
    # As the browser's own button for it does.
    page.evaluate("video.srcObject.getTracks()[0].dispatchEvent(new Event('ended'))")
    expect(page.locator("#status")).to_contain_text("Session ended: ")


@pytest.mark.vllm
def test_a_session_that_was_stopped_is_not_opened_again(page):
    """However its connection ends."""
    sockets = []

    def relay(socket):
        server = socket.connect_to_server()
        socket.on_message(lambda message: cut(socket) if is_stop(message) else server.send(message))
        sockets.append(socket)

    def is_stop(message):
        return isinstance(message, str) and "session.stop" in message

    def cut(socket):
        socket.close(code=1011)

    page.route_web_socket("**/v1/live", relay)
    page.click(".invitation [data-action=camera]")
    give_key(page)
    wait_until(page, f"{SENT} >= 1")
    opened = len(sockets)
    page.click("#stop")
    expect(page.locator("html")).to_have_attribute("data-phase", "empty")
    expect(page.locator("#status")).to_have_text("Stopped")
    expect(page.locator("#problem")).to_be_hidden()
    page.wait_for_timeout(1000)  # Longer than the first wait before a try.
    assert len(sockets) == opened


@pytest.mark.vllm
def test_no_key_is_asked_for_when_there_is_nothing_to_show(page):
    page.click(".invitation [data-action=screen]")
    expect(page.locator("#key-form")).to_be_visible()
    page.evaluate("video.srcObject.getTracks()[0].dispatchEvent(new Event('ended'))")
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("html")).to_have_attribute("data-phase", "empty")


@pytest.mark.vllm
def test_a_video_may_play_and_be_stopped_while_it_is_being_opened(page):
    begin_clip(page)
    page.evaluate(HOLD_LOADED)
    page.click(".controls [data-action=clip]")
    expect(page.locator("html")).to_have_attribute("data-phase", "opening")
    page.evaluate("video.play()")
    wait_until(page, "video.currentTime > 0.3")
    page.click("#stop")
    expect(page.locator("html")).to_have_attribute("data-phase", "stopped")
    page.evaluate("release()")
    page.wait_for_timeout(300)
    expect(page.locator("html")).to_have_attribute("data-phase", "stopped")
    page.click("#reconnect")
    wait_until(page, f"{SENT} >= 1")


@pytest.mark.vllm
def test_a_camera_that_is_allowed_too_late_is_let_go(page):
    page.evaluate(HOLD_CAMERA)
    page.click(".invitation [data-action=camera]")
    begin_clip(page)
    page.evaluate("release()")
    wait_until(page, "window.track?.readyState === 'ended'")
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    expect(page.locator("#source-name")).to_have_text("Sample clip")
    assert page.evaluate("video.srcObject === null")


@pytest.mark.vllm
def test_a_browser_that_cannot_play_the_clip_says_so(page):
    page.route("**/web/digits.mp4", lambda route: route.fulfill(body="in no format of this browser"))
    page.click(".invitation [data-action=clip]")
    expect(page.locator("#problem")).to_have_text(
        "This browser cannot play the sample clip (H.264). Choose a WebM file or the camera."
    )


@pytest.mark.vllm
def test_questions_about_a_still_image(page):
    drawn = draw_image(np.random.default_rng(5), load_samples(held_out=True))
    file = io.BytesIO()
    drawn.to_pil().save(file, "PNG")
    page.set_input_files("#image-file", {"name": "digits.png", "mimeType": "image/png", "buffer": file.getvalue()})
    expect(page.locator("#still")).to_be_visible()
    ask(page, "Read the digits.")
    give_key(page)
    expect(page.locator("#captions li.question .text")).to_have_text([drawn.text])
    page.click("#suggestions >> text=How many digits are there?")
    expect(page.locator("#captions li.question .text")).to_have_text([drawn.text, str(len(drawn.digits))])


@pytest.mark.vllm
def test_a_busy_server_is_asked_again_for_an_answer(page):
    answers = [503, 429]
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=answers.pop()) if answers else route.continue_(),
    )
    drawn = draw_image(np.random.default_rng(6), load_samples(held_out=True))
    file = io.BytesIO()
    drawn.to_pil().save(file, "PNG")
    page.set_input_files("#image-file", {"name": "digits.png", "mimeType": "image/png", "buffer": file.getvalue()})
    ask(page, "How many digits are there?")
    give_key(page)
    expect(page.locator("#captions li.question .text")).to_have_text([str(len(drawn.digits))])


@pytest.mark.vllm
def test_a_file_that_is_no_image_is_told_so(page):
    page.set_input_files("#image-file", {"name": "x.png", "mimeType": "image/png", "buffer": b"What a beautiful day!"})
    expect(page.locator("#problem")).to_contain_text("“x.png” is no picture")


@pytest.mark.vllm
def test_the_captioners_settings_are_sent_and_shown(page):
    created = []

    def relay(socket):
        server = socket.connect_to_server()
        socket.on_message(lambda message: (created.append(message), server.send(message)))

    page.route_web_socket("**/v1/live", relay)
    begin_clip(page)
    page.click("summary")
    expect(page.locator("[name=stop_bias]")).to_have_value("0.9")
    published = {
        "temperature": 0.4,
        "top_k": 256,
        "repetition_penalty": 1.15,
        "penalty_decay": 0.99,
        "penalty_clamp": 5,
        "stop_bias": 0.95,
        "ngram_size": 4,
        "ngram_window": 60,
    }
    for name, value in published.items():
        page.fill(f"[name={name}]", str(value))
    page.click("#apply")
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    last = json.loads([message for message in created if isinstance(message, str)][-1])
    assert published.items() <= last.items()
    for name, value in published.items():
        assert float(page.input_value(f"[name={name}]")) == value
