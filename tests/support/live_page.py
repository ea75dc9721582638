"""The live page as a person meets it: picking a video, giving the key, reading what is on the screen."""

import time
from dataclasses import dataclass

from playwright.sync_api import Page, expect

KEY = "a key/with+signs? that=base64 needs>>"
MAX_SESSIONS = 2
# Longer than a test looks at a video that it has paused, on a busy machine too.
IDLE_TIMEOUT_S = 20
FRAME_S = 0.5


# Runs in the page itself, so that a busy machine does not make the test look away.
NOTE_WHAT_IS_SHOWN = """() => {
    window.shown = [];
    setInterval(() => shown.push([video.currentTime, caption.textContent]), 50);
}"""


NOTE_WHAT_IS_TOLD = """() => {
    window.told = [];
    const note = () => problem.textContent.includes(".") && told.push(problem.textContent);
    new MutationObserver(note).observe(problem, { childList: true });
}"""

# A phone: one camera at a time. Those in `refused` are used by another program.
ONE_CAMERA_AT_A_TIME = """() => {
    const devices = navigator.mediaDevices;
    const open = devices.getUserMedia.bind(devices);
    Object.assign(window, { opened: [], refused: [] });
    devices.getUserMedia = async (wanted) => {
        const isTaken = opened.some((track) => track.readyState === "live");
        if (isTaken || refused.includes(wanted.video.deviceId?.exact)) {
            throw new DOMException("Could not start video source", "NotReadableError");
        }
        const stream = await open(wanted);
        opened.push(...stream.getTracks());
        return stream;
    };
}"""
# How many frames were sent, and the id of the camera that is shown.
SENT = "Number(document.querySelector('[data-count=sent] dd').textContent)"
NOW = "video.srcObject?.getTracks()[0].getSettings().deviceId"


@dataclass
class Watched:
    """A page whose video runs, noting all the while what it shows.

    Attributes:
        page: The page.
        truth: What can be read when.
    """

    page: Page
    truth: list

    def captions_while_it_played(self):
        """Every caption that was over the video, once each, in order."""
        return list(dict.fromkeys(caption for _, caption in self.page.evaluate("shown")))

    def captions_when_gone_back(self):
        """The caption over the video in each scene when a person goes there again."""
        return [self._caption_at(max(span.start, span.end - 0.3)) for span in self.truth]

    def _caption_at(self, time_s):
        self.page.evaluate(f"video.currentTime = {time_s}")
        wait_until(self.page, "!video.seeking")
        self.page.wait_for_timeout(100)
        return self.page.locator("#caption").text_content()

    def texts_around(self, time_s):
        """What could be read then, or one frame before."""
        return {span.text for span in self.truth if span.start <= time_s and time_s - FRAME_S <= span.end}


def pick(page, video, key=KEY):
    """Picks a video and gives the key that the server asks for."""
    page.set_input_files("#file", video)
    give_key(page, key)


def give_key(page, key=KEY):
    """Gives the key when the server asks for it."""
    expect(page.locator("#problem")).to_have_text("This server asks for an API key.")
    page.fill("#key", key)
    page.press("#key", "Enter")


def begin(page, video):
    """Picks a video; returns when the session is open."""
    page.evaluate(NOTE_WHAT_IS_SHOWN)
    pick(page, video)
    expect(page.locator("html")).to_have_attribute("data-phase", "live")


def begin_clip(page):
    """Plays the page's own clip; returns when the session is open."""
    page.click(".invitation [data-action=clip]")
    give_key(page)
    expect(page.locator("html")).to_have_attribute("data-phase", "live")


def begin_camera(page):
    """Captions a phone's camera; returns its id, and that of the other one."""
    page.evaluate(ONE_CAMERA_AT_A_TIME)
    page.click(".invitation [data-action=camera]")
    give_key(page)
    expect(page.locator("#cameras option")).to_have_count(2)
    wait_until(page, f"{SENT} >= 1")
    now = page.evaluate(NOW)
    (other,) = page.evaluate(f"[...cameras.options].map((option) => option.value).filter((id) => id !== '{now}')")
    return now, other


def ask(page, question):
    page.fill("#question", question)
    expect(page.locator("#ask")).to_be_enabled()
    page.press("#question", "Enter")


def wait_until(page, condition, timeout_s=20):
    """Waits for an expression of JavaScript; the page's own policy forbids Playwright's way of polling one."""
    deadline = time.monotonic() + timeout_s
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"{condition} did not come true in {timeout_s} s"
        page.wait_for_timeout(50)


def count(page, name):
    return int(page.locator(f"[data-count={name}] dd").inner_text())


def transcript(page, kind="caption"):
    """The list beside the video: `(time, text)` of its captions, or of its questions."""
    items = page.locator(f"#captions li.{kind}")
    return [
        (seconds(clock), text)
        for clock, text in zip(
            items.locator("time").all_inner_texts(), items.locator(".text").all_inner_texts(), strict=True
        )
    ]


def seconds(clock):
    minutes, rest = clock.split(":")
    return 60 * int(minutes) + float(rest)


class HeldAnswers:
    """Passes the messages of live sessions on, but for answers while `holding`."""

    def __init__(self, page):
        self.holding, self.sockets, self._held = False, [], []
        page.route_web_socket("**/v1/live", self._relay)

    def _relay(self, socket):
        server = socket.connect_to_server()
        server.on_message(lambda message: self._pass(socket, message))
        self.sockets.append(socket)

    def _pass(self, socket, message):
        if self.holding and '"answer.' in message:
            self._held.append((socket, message))
        else:
            socket.send(message)

    def release(self):
        self.holding = False
        for socket, message in self._held:
            socket.send(message)
