"""One real server with an API key and room for two sessions, and Chromium to look at its page with."""

import shutil
from contextlib import contextmanager

import pytest

from casa_digits.video import make_video
from live_page import IDLE_TIMEOUT_S, KEY, MAX_SESSIONS
from serving_process import casa_serve

# Nothing is looked up outside this machine; the two cameras are Chromium's own test pictures.
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-fake-device-for-media-stream=device-count=2 "
    "--use-fake-ui-for-media-stream"
).split()

SECONDS = 14


@pytest.fixture(scope="package")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    limits = ("--live-max-sessions", MAX_SESSIONS, "--live-idle-timeout", IDLE_TIMEOUT_S)
    # Compiling would take longer than all the tests.
    with casa_serve(log, "--enforce-eager", "--api-key", KEY, *map(str, limits)) as running:
        yield running


@pytest.fixture(scope="package")
def chromium():
    """Ends with its folder: while it runs, no other test of this process could run an event loop."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Chromium is not installed: `make browser`, or `apt-get install chromium` on Debian, as root")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def open_page(chromium, server):
    """Open the page; whatever the browser complains about fails the test, and nothing else is loaded."""

    @contextmanager
    def opened(url=server.url, **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        page = context.new_page()
        complaints = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if is_fault(message) else None)
        page.on("request", lambda request: complaints.append(request.url) if is_foreign(request.url, url) else None)
        page.goto(f"{url}/")
        yield page
        context.close()
        assert not complaints

    return opened


def is_fault(message):
    """Return whether a message of the console is one; a refused connection is what some tests are about."""
    return message.type == "error" and not any(word in message.text for word in ("WebSocket", "Failed to load"))


def is_foreign(address, url):
    return not address.startswith((f"{url}/", "blob:"))


@pytest.fixture(scope="package")
def videos(tmp_path_factory):
    """Two videos of digits with the truth about each: `(path, spans)`."""
    folder = tmp_path_factory.mktemp("videos")
    names = {"left.mp4": 17, "right.webm": 7}
    return [
        (folder / name, make_video(folder / name, SECONDS, fps=10, seed=seed, scale=2)) for name, seed in names.items()
    ]
