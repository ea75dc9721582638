"""Without a mouse: everything is reached by Tab, the focus is seen and is never lost."""

import pytest
from playwright.sync_api import expect

from casa_digits.demonstration import DEMONSTRATION
from live_page import KEY, Line, give_key, wait_until

FOCUSED = "document.activeElement.id || document.activeElement.textContent.trim()"
OUTLINE = "getComputedStyle(document.activeElement).outlineStyle"
# A list of real entries, whose newest caption is not finished.
FILL_LIST = """async (count) => {
    const { Transcript } = await import("/web/transcript.js");
    const { TranscriptView } = await import("/web/transcript_view.js");
    const transcript = new Transcript();
    window.view = new TranscriptView(captions, document.querySelector("#captions-scroll"),
        document.querySelector("#captions-empty"), () => undefined);
    const show = (entry) => view.show(entry, transcript.entries);
    window.say = (frame) => show(transcript.captionDelta({ frame, timestamp: frame, text: `caption ${frame}` }));
    window.asked = (id, timestamp) => show(transcript.question(id, timestamp, "What was that?"));
    window.answered = (id, text) => show(transcript.answerDone({ id, text }));
    window.drop = () => transcript.dropUnfinished().reverse().map((entry) => view.remove(entry, transcript.entries));
    for (let frame = 0; frame < count; frame += 1) say(frame);
}"""
# How far below the part of the list that is in sight its end is, and whether a question is in it.
BELOW = "(({ scrollHeight, scrollTop, clientHeight }) => scrollHeight - scrollTop - clientHeight)"
BELOW += "(document.querySelector('#captions-scroll'))"
QUESTION_IN_SIGHT = """(() => {
    const box = (name) => document.querySelector(name).getBoundingClientRect();
    const [list, item] = [box("#captions-scroll"), box("li.question")];
    return item.top >= list.top && item.bottom <= list.bottom;
})()"""


@pytest.fixture(scope="module")
def page(open_page):
    with open_page() as opened:
        yield opened


def tab_to(page, name, key="Tab", most=60):
    """Press Tab until an element has the focus; return what had it on the way."""
    passed = []
    for _ in range(most):
        page.keyboard.press(key)
        passed.append(page.evaluate(FOCUSED))
        if passed[-1] == name:
            assert page.evaluate(OUTLINE) != "none"
            return passed
    raise AssertionError(f"{name} is not reached by {key}: {passed}")


@pytest.mark.vllm
def test_the_clip_is_played_and_asked_about_by_keys_alone(page):
    expect(page.locator("#suggestions button")).to_have_text(DEMONSTRATION["questions"])
    tab_to(page, "Play the sample clip")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_be_visible()
    # What was pressed is gone; the focus stays near it.
    assert page.evaluate(FOCUSED) != ""
    tab_to(page, "key")
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    page.wait_for_selector("#captions li")
    tab_to(page, "Read the digits.")
    page.keyboard.press("Space")
    expect(page.locator("#captions li.question")).to_have_count(1)
    tab_to(page, "question")
    page.keyboard.type("How many digits are there?")
    expect(page.locator("#ask")).to_be_enabled()
    page.keyboard.press("Enter")
    expect(page.locator("#captions li.question")).to_have_count(2)


@pytest.mark.vllm
def test_the_list_is_one_stop_and_the_arrows_go_through_it(page):
    wait_until(page, "captions.querySelectorAll('li').length >= 3")
    stops = page.evaluate("[...captions.querySelectorAll('button')].filter((button) => button.tabIndex === 0).length")
    assert stops == 1
    page.locator("#captions button").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("[...captions.querySelectorAll('button')].indexOf(document.activeElement)") == 2
    page.keyboard.press("Home")
    assert page.evaluate("[...captions.querySelectorAll('button')].indexOf(document.activeElement)") == 0


@pytest.fixture
def live(open_page):
    """A page whose session was opened by keys, and its line."""
    with open_page() as page:
        line = Line(page)
        tab_to(page, "Play the sample clip")
        page.keyboard.press("Enter")
        give_key(page)
        expect(page.locator("html")).to_have_attribute("data-phase", "live")
        page.wait_for_selector("#captions li")
        yield page, line


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["ask", "Read the digits."])
def test_a_button_that_waits_for_an_answer_keeps_the_focus(live, name):
    page, line = live
    line.hold("answer.")
    tab_to(page, "question")
    page.keyboard.type("How many digits are there?")
    tab_to(page, name, "Tab" if name == "ask" else "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#captions li.question")).to_have_count(1)
    expect(page.locator("#ask")).to_be_disabled()
    assert page.evaluate(FOCUSED) == name
    # Pressed once more it says why nothing happens, and keeps what was typed.
    page.fill("#question", "Read the digits.")
    page.get_by_role("button", name="Ask" if name == "ask" else name, exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#question-hint")).to_contain_text("One question at a time")
    expect(page.locator("#captions li.question")).to_have_count(1)
    expect(page.locator("#question")).to_have_value("Read the digits.")
    line.release()
    expect(page.locator("#ask")).to_be_enabled()
    expect(page.locator("#question-hint")).to_be_empty()
    assert page.evaluate(FOCUSED) == name
    page.keyboard.press("Enter")
    expect(page.locator("#captions li.question")).to_have_count(2)


@pytest.mark.vllm
def test_stop_and_reconnect_hand_the_focus_to_each_other(live):
    page, _ = live
    tab_to(page, "stop", "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("Session ended: ")
    assert page.evaluate(FOCUSED) == "reconnect"
    page.keyboard.press("Enter")
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    assert page.evaluate(FOCUSED) == "stop"


@pytest.mark.vllm
def test_a_question_is_typed_on_while_the_connection_is_lost(live):
    page, line = live
    tab_to(page, "question")
    page.keyboard.type("How many ")
    line.cut()
    expect(page.locator("#problem")).to_contain_text("The connection was lost.")
    page.keyboard.type("digits are there?")
    page.keyboard.press("Enter")
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    expect(page.locator("#question")).to_have_value("How many digits are there?")
    assert page.evaluate(FOCUSED) == "question"
    page.keyboard.press("Enter")
    expect(page.locator("#captions li.question")).to_have_count(1)
    expect(page.locator("#question")).to_have_value("")


@pytest.mark.vllm
def test_a_question_before_anything_is_shown_says_what_to_do(open_page):
    with open_page() as page:
        tab_to(page, "question")
        page.keyboard.type("How many digits are there?")
        page.keyboard.press("Enter")
        expect(page.locator("#question-hint")).to_have_text("Choose something to show first, then ask about it.")
        assert page.evaluate(FOCUSED) == "question"


@pytest.mark.vllm
def test_an_entry_that_goes_hands_its_focus_on(open_page):
    with open_page() as page:
        page.evaluate(FILL_LIST, 3)
        # Who comes to the list comes to what is in sight.
        tab_to(page, "0:02.0caption 2")
        page.keyboard.press("Home")
        assert "caption 0" in page.evaluate(FOCUSED)
        page.keyboard.press("End")
        assert "caption 2" in page.evaluate(FOCUSED)
        page.evaluate("drop()")
        assert page.evaluate(FOCUSED) == "captions-scroll"
        page.evaluate(FILL_LIST, 3)
        page.keyboard.press("Tab")
        assert "caption" in page.evaluate(FOCUSED)
        page.evaluate("view.clear({ hint: '', canChoose: true })")
        assert page.evaluate(FOCUSED) == "captions-scroll"


@pytest.mark.vllm
def test_a_list_that_was_passed_by_goes_on_to_its_end_and_to_what_is_asked(open_page):
    with open_page() as page:
        page.evaluate(FILL_LIST, 60)
        wait_until(page, f"{BELOW} === 0")
        tab_to(page, "0:59.0caption 59")
        tab_to(page, "question")
        page.evaluate("say(60)")
        wait_until(page, f"captions.lastElementChild.textContent.includes('caption 60') && {BELOW} === 0")
        # A question about a moment far above, and an answer without a word.
        page.evaluate("asked('q1', 3)")
        wait_until(page, QUESTION_IN_SIGHT)
        expect(page.locator("#captions li.question .text")).to_have_text("…")
        page.evaluate("answered('q1', '')")
        expect(page.locator("#captions li.question .text")).to_have_text("No answer")


@pytest.mark.vllm
def test_the_newest_stays_in_sight_when_the_window_shrinks(open_page):
    with open_page() as page:
        # As beside a video, whose height follows the window's.
        page.evaluate("document.querySelector('.stage').removeAttribute('data-empty')")
        page.evaluate(FILL_LIST, 60)
        wait_until(page, f"{BELOW} === 0")
        width, height = page.viewport_size["width"], page.viewport_size["height"]
        page.set_viewport_size({"width": width, "height": height - 150})
        wait_until(page, f"innerHeight === {height - 150} && {BELOW} === 0")
        # Who reads further up stays there.
        page.evaluate("document.querySelector('#captions-scroll').scrollTop = 0")
        page.wait_for_timeout(200)
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(200)
        assert page.evaluate("document.querySelector('#captions-scroll').scrollTop") == 0
