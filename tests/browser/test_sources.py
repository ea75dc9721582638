"""What can be looked at besides files: cameras, the screen, a still image; and the captioner's settings."""

import io

import numpy as np
import pytest
from playwright.sync_api import expect

from casa_digits.data import draw_image, load_samples
from clip import clip_truth
from live_page import NOW, ONE_CAMERA_AT_A_TIME, SENT, Line, ask, begin_camera, begin_clip, give_key, wait_until

# The video is loaded, but the page hears of it only at `release()`.
HOLD_LOADED = """() => {
    video.addEventListener = function (type, listener, options) {
        const held = type === "loadedmetadata" ? () => (window.release = listener) : listener;
        EventTarget.prototype.addEventListener.call(this, type, held, options);
    };
}"""
# What waits for 15 s waits for a call of one of the `limits`.
HOLD_LIMITS = """() => {
    const begin = setTimeout;
    window.limits = [];
    window.setTimeout = (action, ms, ...rest) => (ms === 15000 ? limits.push(action) : begin(action, ms, ...rest));
}"""
# A phone, which loads no picture before a video plays. Notes the videos that are only tried.
WITHOUT_PICTURE = """() => {
    HTMLMediaElement.prototype.addEventListener = function (type, ...rest) {
        if (type !== "loadeddata") EventTarget.prototype.addEventListener.call(this, type, ...rest);
    };
    const create = document.createElement.bind(document);
    window.tried = [];
    document.createElement = (name) => {
        const element = create(name);
        if (name === "video") tried.push(element);
        return element;
    };
}"""
NOTE_CLOSED = """() => {
    const close = ImageBitmap.prototype.close;
    window.numClosed = 0;
    ImageBitmap.prototype.close = function () { numClosed += 1; close.call(this); };
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
    line = Line(page)
    now, other = begin_camera(page)
    wait_until(page, f"{SENT} >= 4")
    num_sessions = len(line.sockets)
    page.evaluate(f"refused.push('{other}')")
    page.select_option("#cameras", other)
    expect(page.locator("#problem")).to_contain_text("The camera could not be started")
    expect(page.locator("#cameras")).to_have_value(now)
    assert page.evaluate(NOW) == now
    # The session goes on, and so does its time, though that of the camera begins anew.
    before = line.frames()
    line.wait_for(lambda: len(line.frames()) >= len(before) + 2)
    assert len(line.sockets) == num_sessions
    assert line.frames() == sorted(line.frames())
    assert line.frames()[-1] > page.evaluate("video.currentTime") + 1
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
def test_no_key_is_asked_for_when_no_camera_is_left(page):
    page.evaluate(ONE_CAMERA_AT_A_TIME)
    page.click(".invitation [data-action=camera]")
    expect(page.locator("#key-form")).to_be_visible()
    expect(page.locator("#cameras option")).to_have_count(2)
    page.evaluate("for (const option of cameras.options) refused.push(option.value)")
    other = page.evaluate(f"[...cameras.options].find((option) => option.value !== {NOW}).value")
    page.select_option("#cameras", other)
    expect(page.locator("#problem")).to_contain_text("could not be started again either: it is off")
    expect(page.locator("#key-form")).to_be_hidden()


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
    """One that never shows anything can be exchanged, and is given up in the end."""
    page.evaluate(HOLD_LOADED)
    page.evaluate(HOLD_LIMITS)
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
    page.evaluate("limits.forEach((reached) => reached())")
    expect(page.locator("#problem")).to_contain_text("The browser could not show this.")
    expect(page.locator("html")).to_have_attribute("data-phase", "empty")


@pytest.mark.vllm
def test_the_screen_is_captioned_until_it_is_no_longer_shared(page):
    page.click(".invitation [data-action=screen]")
    # There is no way back in time.
    expect(page.locator("#captions-empty")).to_have_text("Each caption is listed here at its time.")
    give_key(page)
    wait_until(page, f"{SENT} >= 1")
    expect(page.locator("#source-name")).to_have_text("Screen")
    ask(page, "Read the digits.")
    expect(page.locator("#captions li.question")).to_have_count(1)
    expect(page.locator("#captions button")).to_have_count(0)
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
    page.fill("#question", "Read the digits.")
    page.press("#question", "Enter")
    expect(page.locator("#question-hint")).to_have_text("Enter the API key first, then ask.")
    page.evaluate("window.track = video.srcObject.getTracks()[0]")
    page.click("#stop")
    assert page.evaluate("track.readyState") == "ended"
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
    """Nor one to which it does not come, or not whole."""
    held = []
    page.route("**/web/digits.*", lambda route: held.append(route))
    page.click(".invitation [data-action=clip]")
    expect(page.locator("#status")).to_have_text("Opening…")
    page.wait_for_timeout(100)
    held[0].abort()
    expect(page.locator("#problem")).to_contain_text("The sample clip could not be loaded.")
    expect(page.locator("#status")).to_have_text("Pick a video to begin")
    page.unroute("**/web/digits.*")
    page.evaluate("problem.textContent = ''")
    page.evaluate("() => { Response.prototype.blob = () => Promise.reject(new TypeError('network error')); }")
    page.click(".invitation [data-action=clip]")
    expect(page.locator("#problem")).to_contain_text("The sample clip could not be loaded.")
    page.reload()
    page.route("**/web/digits.*", lambda route: route.fulfill(body="in no format of this browser"))
    page.click(".invitation [data-action=clip]")
    expect(page.locator("#problem")).to_have_text(
        "This browser cannot play the sample clip: it knows neither H.264 nor VP9. "
        "Use the camera, or ask about an image."
    )


@pytest.mark.vllm
def test_no_key_is_asked_for_beside_an_image_before_a_question(page):
    page.evaluate(WITHOUT_PICTURE)
    page.click(".invitation [data-action=clip]")
    expect(page.locator("#key-form")).to_be_visible()
    assert set(page.evaluate("tried.map((video) => video.getAttribute('src'))")) == {None}
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
    page.evaluate(NOTE_CLOSED)
    page.set_input_files("#image-file", {"name": "digits.png", "mimeType": "image/png", "buffer": file.getvalue()})
    expect(page.locator("#still")).to_be_visible()
    assert page.evaluate("numClosed") == 1  # The canvas has its pixels.
    ask(page, "Read the digits.")
    give_key(page)
    expect(page.locator("#captions li.question .text")).to_have_text([drawn.text])
    expect(page.locator("#captions button")).to_have_count(0)
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
    # What is no answer at all ends it: the question is there to be asked again.
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body="data: {oops\n\n"))
    ask(page, "Read the digits.")
    expect(page.locator("#problem")).to_have_text("The server is busy. Ask again in a moment.")
    expect(page.locator("#question")).to_have_value("Read the digits.")
    page.unroute("**/v1/chat/completions")
    page.click("#ask")
    expect(page.locator("#captions li.question .text")).to_have_text([str(len(drawn.digits)), drawn.text])


@pytest.mark.vllm
def test_a_file_that_is_no_image_is_told_so(page):
    page.set_input_files("#image-file", {"name": "x.png", "mimeType": "image/png", "buffer": b"What a beautiful day!"})
    expect(page.locator("#problem")).to_contain_text("“x.png” is no picture")


@pytest.mark.vllm
def test_the_captioners_settings_are_sent_and_shown(page):
    """Those that a person has changed and applied: not the others, nor what is half typed, at a reconnect either."""
    line = Line(page)
    page.click("summary")
    page.fill("[name=max_frame_tokens]", "12")
    page.click("#apply")
    expect(page.locator("#apply-hint")).to_contain_text("Kept")
    begin_clip(page)
    assert settings(line.created()[-1]) == {"max_frame_tokens": 12}
    expect(page.locator("#apply-hint")).to_contain_text("Opens a new session")
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
    changed = {name: value for name, value in published.items() if float(page.input_value(f"[name={name}]")) != value}
    assert len(changed) >= 4
    for name, value in published.items():
        page.fill(f"[name={name}]", str(value))
    page.click("#apply")
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    assert settings(line.created()[-1]) == {"max_frame_tokens": 12, **changed}
    for name, value in published.items():
        assert float(page.input_value(f"[name={name}]")) == value
    page.fill("[name=fps]", "7")
    page.fill("[name=temperature]", "")
    connected = len(line.created())
    line.cut()
    line.wait_for(lambda: len(line.created()) > connected)
    assert settings(line.created()[-1]) == {"max_frame_tokens": 12, **changed}
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    expect(page.locator("[name=fps]")).to_have_value("7")
    # An empty field is the server's own again.
    page.fill("[name=fps]", "2")
    page.click("#apply")
    line.wait_for(lambda: len(line.created()) > connected + 1)
    del changed["temperature"]
    assert settings(line.created()[-1]) == {"max_frame_tokens": 12, **changed}


def settings(create):
    """Those of a `session.create`."""
    return {name: value for name, value in create.items() if name not in ("type", "history")}
