"""The live page as a person meets it: picking a video, giving the key, reading what is on the screen."""

import json
import time
from dataclasses import dataclass

from playwright.sync_api import Page, expect

from casa_serving.live.protocol import TIMESTAMP

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

# What would pass by itself stays: a message that is shown for a while, the time until the next try to connect.
HOLD_LONG_TIMERS = """(() => {
    const begin = setTimeout;
    window.setTimeout = (action, ms, ...rest) => (ms < 250 ? begin(action, ms, ...rest) : 0);
})()"""

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
# How many frames were sent, and captioned, and the id of the camera that is shown.
SENT = "Number(document.querySelector('[data-count=sent] dd').textContent)"
CAPTIONED = "Number(document.querySelector('[data-count=captioned] dd').textContent)"
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
    """Pick a video and give the key that the server asks for."""
    page.set_input_files("#file", video)
    give_key(page, key)


def give_key(page, key=KEY):
    """Give the key when the server asks for it."""
    expect(page.locator("#problem")).to_have_text("This server asks for an API key.")
    page.fill("#key", key)
    page.press("#key", "Enter")


def begin(page, video):
    """Pick a video; return when the session is open."""
    page.evaluate(NOTE_WHAT_IS_SHOWN)
    pick(page, video)
    expect(page.locator("html")).to_have_attribute("data-phase", "live")


def begin_clip(page):
    """Play the page's own clip; return when the session is open."""
    page.click(".invitation [data-action=clip]")
    give_key(page)
    expect(page.locator("html")).to_have_attribute("data-phase", "live")


def begin_camera(page):
    """Caption a phone's camera; return its id, and that of the other one."""
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
    """Wait for an expression of JavaScript; the page's own policy forbids Playwright's way of polling one."""
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


def finished_captions(page, at_least=1):
    """The captions that the page keeps, whatever happens to the session: what is being written is lost with it."""
    wait_until(page, f"{CAPTIONED} >= {at_least}")
    finished = count(page, "captioned")
    return transcript(page)[:finished]


def seconds(clock):
    minutes, rest = clock.split(":")
    return 60 * int(minutes) + float(rest)


class Line:
    """The live sessions of a page: notes what the page sends, and holds what the server says where a test wants it.

    Attributes:
        sockets: The page's end of each connection, the newest last.
        sent: What the page has sent: the timestamp of a frame, or a message.
        heard: What the server has said.
    """

    def __init__(self, page):
        self.sockets, self.sent, self.heard = [], [], []
        self._page, self._held, self._holding = page, [], None
        page.route_web_socket("**/v1/live", self._relay)

    def hold(self, kind):
        """Hold the server's messages whose type begins so."""
        self._holding = f'"type":"{kind}'

    def release(self):
        """Pass on what was held, and what comes from now on."""
        self._holding = None
        for socket, message in self._held:
            socket.send(message)
        self._held.clear()

    def cut(self):
        """Break the connection."""
        self.sockets[-1].close(code=1011, reason="cut")

    def say(self, **event):
        """Send the page an event in the server's name."""
        self.sockets[-1].send(json.dumps(event))

    def created(self):
        """The page's `session.create` of each connection."""
        return [message for message in self.sent if isinstance(message, dict) and message["type"] == "session.create"]

    def silent(self):
        """The timestamps of frames to which nothing was said."""
        return [event["timestamp"] for event in self.heard if event["type"] == "frame.done" and not event["caption"]]

    def frames(self):
        """The timestamps of the frames of the newest session."""
        newest = max(index for index, message in enumerate(self.sent) if message in self.created())
        return [message for message in self.sent[newest:] if isinstance(message, float)]

    def wait_for(self, condition, timeout_s=20):
        """Wait for something that the page sends."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.sent[-10:]
            self._page.wait_for_timeout(20)

    def _relay(self, socket):
        server = socket.connect_to_server()
        socket.on_message(lambda message: self._to_server(server, message))
        server.on_message(lambda message: self._to_page(socket, message))
        self.sockets.append(socket)

    def _to_server(self, server, message):
        is_frame = isinstance(message, bytes)
        self.sent.append(TIMESTAMP.unpack_from(message)[0] if is_frame else json.loads(message))
        server.send(message)

    def _to_page(self, socket, message):
        self.heard.append(json.loads(message))
        if self._holding and self._holding in message:
            self._held.append((socket, message))
        else:
            socket.send(message)
