"""What can be looked at besides files: cameras, the screen, a still image; and the captioner's settings."""

import io
import json

import numpy as np
import pytest
from playwright.sync_api import expect

from casa_digits.data import draw_image, load_samples
from clip import clip_truth
from live_page import NOW, SENT, ask, begin_camera, begin_clip, give_key, wait_until

# The video is loaded, but the page hears of it only at `release()`.
HOLD_LOADED = """() => {
    video.addEventListener = function (type, listener, options) {
        const held = type === "loadeddata" ? () => (window.release = listener) : listener;
        EventTarget.prototype.addEventListener.call(this, type, held, options);
    };
}"""
# A browser that knows that it plays no MP4.
WITHOUT_MP4 = """() => {
    HTMLMediaElement.prototype.canPlayType = (type) => (type.includes("mp4") ? "" : "maybe");
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
def test_a_phone_exchanges_its_cameras_one_after_the_other(page):
    _, other = begin_camera(page)
    page.select_option("#cameras", other)
    wait_until(page, f"{NOW} === '{other}'")
    expect(page.locator("#cameras")).to_have_value(other)
    expect(page.locator("#problem")).to_be_hidden()
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    wait_until(page, f"{SENT} >= 1")
    assert page.evaluate("opened.map((track) => track.readyState)") == ["ended", "live"]


@pytest.mark.vllm
def test_a_camera_that_cannot_be_opened_leaves_the_one_before(page):
    sockets = []
    page.route_web_socket("**/v1/live", lambda socket: sockets.append(socket.connect_to_server()))
    now, other = begin_camera(page)
    num_sessions = len(sockets)
    page.evaluate(f"refused.push('{other}')")
    page.select_option("#cameras", other)
    expect(page.locator("#problem")).to_contain_text("The camera could not be started")
    expect(page.locator("#cameras")).to_have_value(now)
    assert page.evaluate(NOW) == now
    sent = page.evaluate(SENT)
    wait_until(page, f"{SENT} > {sent}")
    assert len(sockets) == num_sessions, "the session goes on"
    # Two choices at once end with the second, and one camera open.
    page.evaluate("refused.length = 0")
    page.evaluate(
        f"for (const id of ['{other}', '{now}']) {{ cameras.value = id; cameras.dispatchEvent(new Event('change')); }}"
    )
    wait_until(page, f"{NOW} === '{now}' && opened.filter((track) => track.readyState === 'live').length === 1")
    expect(page.locator("html")).to_have_attribute("data-phase", "live")


@pytest.mark.vllm
def test_no_camera_left_is_told_so(page):
    now, other = begin_camera(page)
    page.evaluate(f"refused.push('{now}', '{other}')")
    page.select_option("#cameras", other)
    expect(page.locator("#problem")).to_contain_text("could not be started again either: it is off")
    expect(page.locator("html")).to_have_attribute("data-phase", "empty")
    expect(page.locator(".invitation")).to_be_visible()


@pytest.mark.vllm
def test_a_camera_that_is_exchanged_is_stopped_all_the_same(page):
    """Stop while the other one is being opened: no camera comes on afterwards."""
    _, other = begin_camera(page)
    page.evaluate(HOLD_CAMERA)
    page.select_option("#cameras", other)
    wait_until(page, "'release' in window")
    page.click("#stop")
    expect(page.locator("html")).to_have_attribute("data-phase", "empty")
    page.evaluate("release()")
    wait_until(page, "window.track?.readyState === 'ended'")
    expect(page.locator("html")).to_have_attribute("data-phase", "empty")


@pytest.mark.vllm
def test_cameras_are_offered_before_one_has_a_picture(page):
    """One that never shows anything can be exchanged."""
    page.evaluate(HOLD_LOADED)
    page.click(".invitation [data-action=camera]")
    expect(page.locator("#cameras option")).to_have_count(2)
    expect(page.locator("html")).to_have_attribute("data-phase", "opening")
    expect(page.locator("#cameras")).to_be_visible()
    names = page.locator("#cameras option").all_inner_texts()
    assert all("fake_device" in name for name in names), names
    # A camera is plugged in or out.
    page.evaluate("navigator.mediaDevices.enumerateDevices = async () => []")
    page.evaluate("navigator.mediaDevices.dispatchEvent(new Event('devicechange'))")
    expect(page.locator("#cameras")).to_be_hidden()


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
@pytest.mark.parametrize("says", ["no", "maybe"])
def test_a_browser_without_h264_plays_the_other_clip(page, says):
    """One that knows it, and one that finds out; what is loaded is the WebM file as it is served."""
    loaded = []
    page.on("request", lambda request: loaded.append(request.url.rpartition("/")[2]))
    if says == "no":
        page.evaluate(WITHOUT_MP4)
    page.route("**/web/digits.mp4", lambda route: route.fulfill(body="in no format of this browser"))
    begin_clip(page)
    assert [name for name in loaded if name.startswith("digits")] == ["digits.mp4", "digits.webm"][says == "no" :]
    expect(page.locator("#captions li.caption .text").first).to_have_text(clip_truth()[0].text)
    assert page.evaluate("video.duration") == clip_truth()[-1].end


@pytest.mark.vllm
def test_a_browser_that_cannot_play_the_clip_says_so(page):
    page.route("**/web/digits.*", lambda route: route.fulfill(body="in no format of this browser"))
    page.click(".invitation [data-action=clip]")
    expect(page.locator("#problem")).to_have_text(
        "This browser cannot play the sample clip: it knows neither H.264 nor VP9. "
        "Use the camera, or ask about an image."
    )


@pytest.mark.vllm
def test_no_key_is_asked_for_beside_an_image_before_a_question(page):
    page.click(".invitation [data-action=clip]")
    expect(page.locator("#key-form")).to_be_visible()
    # Its parts stand side by side, and nothing else offers to connect.
    heights = page.evaluate("[...document.querySelector('#key-form').children].map((part) => part.offsetTop)")
    assert max(heights) - min(heights) < 44, heights
    expect(page.locator("#reconnect")).to_be_hidden()
    file = io.BytesIO()
    draw_image(np.random.default_rng(5), load_samples(held_out=True)).to_pil().save(file, "PNG")
    page.set_input_files("#image-file", {"name": "digits.png", "mimeType": "image/png", "buffer": file.getvalue()})
    expect(page.locator("#still")).to_be_visible()
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#problem")).to_be_hidden()
    ask(page, "Read the digits.")
    give_key(page)
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#captions li.question")).to_have_count(1)


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
    # There is no time beside it: the question has the whole line.
    assert page.locator(".asked").bounding_box()["height"] < 30
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
