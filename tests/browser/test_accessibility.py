"""Every state of the page on a desktop and a phone, light and dark: axe finds nothing, and a finger hits everything."""

import io

import pytest
from PIL import Image
from playwright.sync_api import expect

from accessibility import SCHEMES, SIZES, axe_report, overflow_px, small_targets
from clip import clip_truth
from live_page import HOLD_LONG_TIMERS, Line, ask, begin_camera, begin_clip, give_key, wait_until

# axe looks at the page for longer than a caption takes to move the list.
SETTLE_MS = 500


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


def asked(page):
    """Waits for an answer, and a second question was pressed meanwhile."""
    line = Line(page)
    live(page)
    line.hold("answer.")
    for _ in range(2):
        page.fill("#question", "Read the digits.")
        page.press("#question", "Enter")
    expect(page.locator("#question-hint")).to_contain_text("One question at a time")


def waiting(page):
    line = Line(page)
    live(page)
    page.evaluate(HOLD_LONG_TIMERS)
    line.cut()
    expect(page.locator("#problem")).to_contain_text("The connection was lost.")


def stopped(page):
    live(page)
    page.click("#stop")
    expect(page.locator("#status")).to_contain_text("Session ended: ")


def camera(page):
    page.click(".invitation [data-action=camera]")
    give_key(page)
    expect(page.locator("#cameras")).to_be_visible()


def no_camera(page):
    _, other = begin_camera(page)
    page.evaluate(HOLD_LONG_TIMERS)
    page.evaluate("for (const option of cameras.options) refused.push(option.value)")
    page.select_option("#cameras", other)
    expect(page.locator("#problem")).to_contain_text("could not be started again either")


def wrong_file(page):
    page.evaluate(HOLD_LONG_TIMERS)
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"What a beautiful day!"})
    expect(page.locator("#problem")).to_contain_text("cannot be played")


def image(page):
    file = io.BytesIO()
    Image.new("RGB", (56, 56), "navy").save(file, "PNG")
    page.set_input_files("#image-file", {"name": "navy.png", "mimeType": "image/png", "buffer": file.getvalue()})
    ask(page, "How many digits are there?")
    give_key(page)
    wait_until(page, "captions.textContent.includes('How many') && ask.ariaDisabled === 'false'")


# Each state with the phase that it is.
STATES = {
    empty: "empty",
    key: "stopped",
    live: "live",
    answered: "live",
    asked: "live",
    waiting: "waiting",
    stopped: "stopped",
    camera: "live",
    no_camera: "empty",
    wrong_file: "empty",
    image: "image",
}


@pytest.mark.vllm
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_anybody_can_use_it(open_page, state, request):
    with open_page(reduced_motion="reduce") as page:
        state(page)
        phase = expect(page.locator("html"))
        phase.to_have_attribute("data-phase", STATES[state])
        page.evaluate("video.pause()")
        page.wait_for_timeout(SETTLE_MS)
        problem = page.locator("#problem").is_visible()
        for size, viewport in SIZES.items():
            page.set_viewport_size(viewport)
            assert overflow_px(page) == 0, size
            assert small_targets(page) == [], size
            for scheme in SCHEMES:
                page.emulate_media(color_scheme=scheme)
                violations, undecided = axe_report(page)
                assert page.locator("html").get_attribute("data-phase") == STATES[state], (size, scheme)
                assert page.locator("#problem").is_visible() == problem, (size, scheme)
                request.node.user_properties.append((f"axe {size} {scheme}", f"{len(violations)}, {undecided}"))
                assert violations == [], (size, scheme)
