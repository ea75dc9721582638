"""Questions about what is shown: the model has seen that picture, and no question is lost."""

import pytest
from playwright.sync_api import expect

from clip import clip_truth
from live_page import HOLD_LONG_TIMERS, Line, ask, begin_clip, transcript, wait_until

READ = "Read the digits."
FIRST, SECOND, *_ = clip_truth()
SILENT_S = 1.2  # Nothing has changed by then.
# Pictures are encoded, and the video goes to another time, only at a call.
HOLD_PICTURES = """() => {
    const encode = HTMLCanvasElement.prototype.toBlob;
    window.held = [];
    HTMLCanvasElement.prototype.toBlob = function (...rest) { held.push(() => encode.apply(this, rest)); };
    window.release = () => {
        HTMLCanvasElement.prototype.toBlob = encode;
        held.forEach((go) => go());
    };
}"""
HOLD_SEEKS = """() => {
    const { prototype } = HTMLMediaElement;
    const own = (name) => Object.getOwnPropertyDescriptor(prototype, name);
    const [time, seeking] = [own("currentTime"), own("seeking")];
    window.sought = null;
    Object.defineProperty(video, "currentTime", {
        configurable: true,
        get: () => sought ?? time.get.call(video),
        set: (value) => (window.sought = value),
    });
    const isSeeking = () => sought !== null || seeking.get.call(video);
    Object.defineProperty(video, "seeking", { configurable: true, get: isSeeking });
    window.release = () => {
        delete video.currentTime;
        delete video.seeking;
        video.currentTime = sought;
    };
}"""


@pytest.fixture(scope="module")
def paused(open_page):
    """The clip, in whose second scene the tests leave it but for the last, paused all the time; and its line."""
    with open_page() as page:
        line = Line(page)
        page.evaluate("video.addEventListener('play', () => video.pause(), { once: true })")
        begin_clip(page)
        expect(page.locator("#captions li")).to_have_count(1)
        go_to(page, SILENT_S)
        line.wait_for(lambda: SILENT_S in line.silent())
        go_to(page, SECOND.start + 0.2)
        expect(page.locator("#captions li.caption .text")).to_have_text([FIRST.text, SECOND.text])
        page.evaluate(HOLD_LONG_TIMERS)
        yield page, line


def answers(page):
    return [text for _, text in transcript(page, "question")]


def go_to(page, time_s):
    page.evaluate(f"video.currentTime = {time_s}")
    wait_until(page, "!video.seeking")


def ask_and_wait(page, question):
    asked = page.locator("#captions li.question").count()
    ask(page, question)
    expect(page.locator("#captions li.question")).to_have_count(asked + 1)
    expect(page.locator("#ask")).to_be_enabled()


@pytest.mark.vllm
def test_a_question_is_about_the_picture_that_is_shown(paused):
    """Also where that was captioned long ago, or is the first of a new session; its caption stays one."""
    page, line = paused
    first, second = FIRST.text, SECOND.text
    captions = transcript(page)
    # A moment that has no caption of its own: the one before it stands for it as well.
    go_to(page, SILENT_S)
    ask_and_wait(page, READ)
    assert (answers(page), line.frames()[-1]) == ([first], SILENT_S)
    assert transcript(page) == captions
    # A moment that has a caption, by its entry in the list.
    page.locator("#captions li.caption button").nth(1).click()
    ask_and_wait(page, READ)
    assert sorted(answers(page)) == sorted([first, second])
    assert transcript(page) == captions
    # A new session: after a cut, and with other settings. A video that was paused stays so.
    cut(page, line)
    line.wait_for(line.frames)
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    ask_and_wait(page, READ)
    page.evaluate("document.querySelector('details').open = true")
    page.fill("[name=max_answer_tokens]", "24")
    page.click("#apply")
    line.wait_for(lambda: line.created()[-1].get("max_answer_tokens") == 24 and line.frames())
    ask_and_wait(page, READ)
    assert sorted(answers(page)) == sorted([first, second, second, second])
    assert transcript(page) == captions
    assert page.evaluate("video.paused")


@pytest.mark.vllm
def test_a_question_without_an_answer_is_given_back(paused):
    page, line = paused
    hint = f"“{READ}” was not answered. Ask it again."
    before, listed = questions(line), page.locator("#captions li.question").count()
    line.hold("answer.")
    # The line breaks.
    ask(page, READ)
    expect(page.locator("#question")).to_have_value("")
    line.wait_for(lambda: questions(line) == before + 1)
    cut(page, line)
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    expect(page.locator("#question")).to_have_value(READ)
    expect(page.locator("#question-hint")).to_have_text(hint)
    # Other settings are applied, and something else is being typed.
    page.press("#question", "Enter")
    line.wait_for(lambda: questions(line) == before + 2)
    expect(page.locator("#question-hint")).to_be_empty()
    page.fill("#question", "How many")
    page.evaluate("document.querySelector('details').open = true")
    page.click("#apply")
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    expect(page.locator("#question")).to_have_value("How many")
    expect(page.locator("#question-hint")).to_have_text(hint)
    # The server rejects it: in words for operators, which are for the console.
    ask(page, READ)
    line.wait_for(lambda: questions(line) == before + 3)
    question = line.sent[-1]["id"]
    line.say(type="error", code="bad_message", message="--limit", frame=None, question=None, id=question, fatal=False)
    expect(page.locator("#problem")).to_have_text(
        "The server does not take this question. Ask a shorter one, in plain words."
    )
    expect(page.locator("#question")).to_have_value(READ)
    line.release()
    page.press("#question", "Enter")
    expect(page.locator("#captions li.question")).to_have_count(listed + 1)
    expect(page.locator("#captions li.question .text").last).to_have_text(SECOND.text)
    expect(page.locator("#question-hint")).to_be_empty()


@pytest.mark.vllm
def test_the_last_picture_of_a_search_is_captioned_and_the_first_of_a_new_start(paused):
    page, line = paused
    page.evaluate(HOLD_PICTURES)
    go_to(page, 17)
    wait_until(page, "held.length > 0")
    go_to(page, 36)
    page.evaluate("release()")
    there = next(span.text for span in clip_truth() if span.start <= 36 < span.end)
    expect(page.locator("#caption")).to_have_text(there)
    # Start over: the picture of the end is still on the screen when the session is open.
    page.evaluate(HOLD_SEEKS)
    connected = len(line.sockets)
    page.click("#restart")
    line.wait_for(lambda: len(line.sockets) > connected)
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    page.wait_for_timeout(200)
    page.evaluate("release()")
    expect(page.locator("#captions li.caption .text").first).to_have_text(FIRST.text)
    line.wait_for(line.frames)
    assert line.frames()[0] < 1


def cut(page, line):
    """Break the line; it is taken up at once."""
    line.cut()
    page.get_by_role("button", name="Try now").click()


def questions(line):
    """How many were sent."""
    return sum(isinstance(message, dict) and message["type"] == "question" for message in line.sent)
