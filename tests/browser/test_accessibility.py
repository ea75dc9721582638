"""Every state of the page on a desktop and a phone, light and dark: axe finds nothing, and a finger hits everything."""

import io

import pytest
from PIL import Image
from playwright.sync_api import expect

from accessibility import SCHEMES, SIZES, axe_report, overflow_px, small_targets
from clip import clip_truth
from live_page import ask, begin_clip, give_key, wait_until

# axe looks at the page for longer than a caption takes to move the list.
SETTLE = """() => new Promise((resolve) => {
    video.pause();
    setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(resolve)), 500);
})"""


def empty(page):
    expect(page.locator("#model-name")).to_have_text("casa-tiny-digits")


def key(page):
    page.click(".invitation [data-action=clip]")
    expect(page.locator("#key")).to_be_visible()


def live(page):
    begin_clip(page)
    page.wait_for_selector("#captions li")


def answered(page):
    live(page)
    ask(page, "Read the digits.")
    expect(page.locator("#captions li.question .text")).to_have_text([clip_truth()[0].text])
    page.evaluate("document.querySelector('details').open = true")


def waiting(page):
    sockets = []
    page.route_web_socket("**/v1/live", lambda socket: sockets.append(socket) or socket.connect_to_server())
    live(page)
    page.route_web_socket("**/v1/live", lambda socket: socket.close(code=1011))
    sockets[-1].close(code=1011)
    expect(page.locator("html")).to_have_attribute("data-phase", "waiting")


def stopped(page):
    live(page)
    page.click("#stop")
    expect(page.locator("#status")).to_contain_text("Session ended: ")


def camera(page):
    page.click(".invitation [data-action=camera]")
    give_key(page)
    expect(page.locator("#cameras")).to_be_visible()


def wrong_file(page):
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"What a beautiful day!"})
    expect(page.locator("#problem")).to_contain_text("cannot be played")


def image(page):
    file = io.BytesIO()
    Image.new("RGB", (56, 56), "navy").save(file, "PNG")
    page.set_input_files("#image-file", {"name": "navy.png", "mimeType": "image/png", "buffer": file.getvalue()})
    ask(page, "How many digits are there?")
    give_key(page)
    wait_until(page, "captions.textContent.includes('How many') && !ask.disabled")


STATES = (empty, key, live, answered, waiting, stopped, camera, wrong_file, image)


@pytest.mark.vllm
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_anybody_can_use_it(open_page, state, request):
    with open_page(reduced_motion="reduce") as page:
        state(page)
        page.evaluate(SETTLE)
        for size, viewport in SIZES.items():
            page.set_viewport_size(viewport)
            assert overflow_px(page) == 0, size
            assert small_targets(page) == [], size
            for scheme in SCHEMES:
                page.emulate_media(color_scheme=scheme)
                violations, undecided = axe_report(page)
                request.node.user_properties.append((f"axe {size} {scheme}", f"{len(violations)}, {undecided}"))
                assert violations == [], (size, scheme)
