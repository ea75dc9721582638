"""The page in real Chromium: videos play, the right captions appear at their time, and errors are sentences."""

import re

import pytest
from playwright.sync_api import expect

from casa_engine.live.settings import INTEGER_RANGES, MAX_TEXT_CHARACTERS, NUMBER_RANGES
from casa_serving.live.protocol import MAX_QUESTION_CHARACTERS
from live_page import (
    FRAME_S,
    IDLE_TIMEOUT_S,
    KEY,
    NOTE_WHAT_IS_TOLD,
    Line,
    Watched,
    ask,
    begin,
    count,
    finished_captions,
    pick,
    transcript,
    wait_until,
)

PATIENCE_S = 20
# A 448x224 picture is 32 image tokens, each with keys and values of 2 heads of 32 in 5 layers, as float32.
INSERTED_BYTES = 32 * 2 * 2 * 32 * 5 * 4


NOTE_PHASES = """() => {
    window.phases = [];
    const note = () => phases.push(document.documentElement.dataset.phase);
    new MutationObserver(note).observe(document.documentElement, { attributeFilter: ["data-phase"] });
}"""


def as_bytes(text):
    number, unit = text.split()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit]


@pytest.fixture(scope="module")
def watched(open_page, videos):
    """Two pages that played different videos at once; on the first a question was asked, and a third had no room."""
    with open_page() as left, open_page() as right, open_page() as third:
        pages = [Watched(page, truth) for page, (_, truth) in zip((left, right), videos, strict=True)]
        for watching, (video, _) in zip(pages, videos, strict=True):
            begin(watching.page, video)
        ask(left, "How many digits are there?")
        third.evaluate(NOTE_WHAT_IS_TOLD)
        pick(third, videos[0][0])
        for page in (left, right):
            wait_until(page, "video.ended", timeout_s=3 * PATIENCE_S)
        yield [*pages, third]


@pytest.fixture
def page(open_page):
    with open_page() as opened:
        yield opened


@pytest.mark.vllm
@pytest.mark.parametrize("side", [0, 1], ids=["left", "right"])
def test_the_right_captions_appear_at_their_time_on_both_pages(watched, side):
    truth = [span.text for span in watched[side].truth]
    again = watched[side].captions_when_gone_back()
    # The model misreads one text in twenty.
    assert sum(caption == text for caption, text in zip(again, truth, strict=True)) >= len(truth) - 1, again
    shown = watched[side].captions_while_it_played()
    assert sum(text in shown for text in truth) >= len(truth) - 1, shown


@pytest.mark.vllm
@pytest.mark.parametrize("side", [0, 1], ids=["left", "right"])
def test_the_transcript_has_each_change_once_and_within_a_frame(watched, side):
    truth, captions = watched[side].truth, transcript(watched[side].page)
    caught = [any(0 <= said - span.start <= 2 * FRAME_S for said, _ in captions) for span in truth]
    assert sum(caught) >= len(truth) - 1, captions
    assert len(captions) <= len(truth) + 1, captions


@pytest.mark.vllm
def test_a_question_is_answered_in_between(watched):
    ((asked, answer),) = transcript(watched[0].page, "question")
    assert answer in {str(len(text.split())) for text in watched[0].texts_around(asked)}
    assert transcript(watched[1].page, "question") == []


@pytest.mark.vllm
def test_every_frame_is_accounted_for_and_memory_stays_flat(watched):
    for watching in watched[:2]:
        page = watching.page
        read = count(page, "captioned") + count(page, "silent")
        # On a busy machine Chromium itself does not get to show every frame.
        assert count(page, "sent") >= 0.4 * watching.truth[-1].end / FRAME_S
        assert count(page, "sent") - read - count(page, "dropped") <= 1
        pages = page.locator(".plot .value").nth(2).inner_text()
        held, inserted = map(as_bytes, re.fullmatch(r"(.+), not (.+)", pages).groups())
        assert held < inserted
        assert inserted == pytest.approx(read * INSERTED_BYTES, rel=0.01)
        for line in ("delay", "limit", "text", "budget", "held", "inserted"):
            assert page.locator(f".line-{line}").get_attribute("d").count("L") > 10
        # Each count's name, then its number, for those who hear them.
        assert set(page.evaluate("[...counts.children].map(({ innerHTML }) => innerHTML.slice(0, 4))")) == {"<dt>"}


@pytest.mark.vllm
def test_a_chosen_caption_is_shown_again_and_not_asked_for_again(watched):
    page, sent = watched[0].page, count(watched[0].page, "sent")
    said, text = transcript(page)[1]
    page.locator("#captions li.caption button").nth(1).press("Enter")
    wait_until(page, "!video.seeking")
    assert abs(page.evaluate("video.currentTime") - said) < 0.11
    expect(page.locator("#caption")).to_have_text(text)
    assert count(page, "sent") == sent


@pytest.mark.vllm
def test_one_page_too_many_is_told_so_and_gets_the_next_free_place(watched):
    """The others have ended and are let go for want of frames."""
    page = watched[2]
    expect(page.locator("html")).to_have_attribute("data-phase", "live", timeout=1000 * (60 + IDLE_TIMEOUT_S))
    told = page.evaluate("told")
    assert told[:2] == ["This server asks for an API key.", told[1]]
    assert told[1].startswith("All places are taken right now.")
    page.click("#stop")
    expect(page.locator("#status")).to_contain_text("Session ended: ")


@pytest.mark.vllm
def test_a_wrong_key_is_told_so(page, videos):
    pick(page, videos[0][0], "wrong")
    expect(page.locator("#problem")).to_have_text("The server does not know this API key.")


@pytest.mark.vllm
def test_the_settings_are_the_servers_and_can_be_changed(page, videos):
    begin(page, videos[0][0])
    page.click("summary")
    fields = {name: page.locator(f"[name={name}]") for name in ("fps", "temperature", "text_budget", "instruction")}
    expect(fields["fps"]).to_have_value("2")
    expect(fields["temperature"]).to_have_value("0")
    expect(fields["instruction"]).to_have_value(re.compile("digits"))
    fields["temperature"].fill("-1")
    page.click("#apply")
    # In the page's words, not in the server's.
    expect(page.locator("#problem")).to_have_text(
        "The server does not take these settings: Temperature (0: the likeliest), from 0 to 10. "
        "Change them below the video, then press Apply."
    )
    fields["temperature"].fill("0.5")
    fields["fps"].fill("4")
    page.click("#apply")
    expect(page.locator("#status")).to_have_text("Live at 4 frames a second")


@pytest.mark.vllm
def test_the_fields_are_bounded_as_the_server_bounds_them(page):
    wait_until(page, "document.getElementsByName('question')[0].maxLength > 0")
    names = page.evaluate("[...document.querySelectorAll('input[type=number]')].map((field) => field.name)")
    # All numbers of the settings but the generator's seed, which is for tests.
    assert set(INTEGER_RANGES | NUMBER_RANGES) == set(names)
    for name in names:
        low, high = (INTEGER_RANGES | NUMBER_RANGES)[name]
        bounds = page.evaluate(f"((field) => [field.min, field.max])(document.getElementsByName('{name}')[0])")
        assert [float(bound) for bound in bounds] == [low, high]
    lengths = {"instruction": MAX_TEXT_CHARACTERS, "question": MAX_QUESTION_CHARACTERS}
    for name, longest in lengths.items():
        assert page.evaluate(f"document.getElementsByName('{name}')[0].maxLength") == longest


# Whether the page has taken a file, and a text.
DROP_BESIDE_THE_STAGE = """() => {
    const drop = (put) => {
        const dataTransfer = new DataTransfer();
        put(dataTransfer.items);
        const event = new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true });
        return !document.querySelector(".figures").dispatchEvent(event);
    };
    const file = new File(["What a beautiful day!"], "notes.txt", { type: "text/plain" });
    return [drop((items) => items.add(file)), drop((items) => items.add("9 3", "text/plain"))];
}"""
TAKE_PICTURE = """async (limits) => {
    const { takePicture } = await import("/web/frames.js");
    const shown = Object.assign(document.createElement("canvas"), { width: 1280, height: 720 });
    Object.assign(shown, { videoWidth: shown.width, videoHeight: shown.height });
    const picture = await createImageBitmap(await takePicture(shown, document.createElement("canvas"), limits));
    return [picture.width, picture.height];
}"""


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("side", "pixels", "size"),
    [(16_384, 4096 * 4096, [640, 360]), (320, 4096 * 4096, [320, 180]), (16_384, 160 * 160, [160, 90])],
    ids=["the page's own", "side", "pixels"],
)
def test_a_picture_is_no_larger_than_the_server_takes(page, side, pixels, size):
    assert page.evaluate(TAKE_PICTURE, {"max_frame_side": side, "max_frame_pixels": pixels}) == size


@pytest.mark.vllm
def test_a_paused_video_lets_its_session_go_and_takes_it_up_again(page, videos):
    line = Line(page)
    begin(page, videos[0][0])
    wait_until(page, "captions.querySelectorAll('li').length > 0 && video.currentTime > 2.1")
    page.evaluate("video.pause()")
    told = expect(page.locator("#status"))
    told.to_contain_text("goes on when the video plays", timeout=1000 * (IDLE_TIMEOUT_S + PATIENCE_S))
    before = transcript(page)
    page.evaluate("video.currentTime = 0.1")
    page.evaluate("video.play()")
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    # What is shown is captioned already, and yet the new session has never seen it.
    line.wait_for(line.frames)
    assert line.frames()[0] < 1
    assert transcript(page)[: len(before)] == before


@pytest.mark.vllm
def test_a_broken_connection_is_taken_up_with_the_captions_so_far(page, videos):
    sockets, created, held = [], [], []
    holding = False

    def relay(socket):
        server = socket.connect_to_server()
        socket.on_message(lambda message: take(server, message))
        sockets.append(socket)

    def take(server, message):
        if isinstance(message, str):
            created.append(message)
        if holding:
            held.append((server, message))
        else:
            server.send(message)

    page.route_web_socket("**/v1/live", relay)
    begin(page, videos[0][0])
    before = finished_captions(page, at_least=2)
    holding = True
    page.evaluate(NOTE_PHASES)
    sockets[-1].close(code=1011, reason="cut")
    expect(page.locator("#problem")).to_contain_text("The connection was lost. Your captions are kept")
    expect(page.locator("html")).to_have_attribute("data-phase", "connecting")
    assert page.evaluate("phases") == ["waiting", "connecting"]
    assert page.evaluate("video.paused")
    for _ in range(1000):  # The new connection asks for its session as soon as it is open.
        if held:
            break
        page.wait_for_timeout(20)
    holding = False
    for server, message in held:
        server.send(message)
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    expect(page.locator("#problem")).to_be_hidden()
    assert all(f'"caption":"{text}"' in created[-1] for _, text in before)
    wait_until(page, f"captions.querySelectorAll('li').length > {len(before)}")
    assert transcript(page)[: len(before)] == before


@pytest.mark.vllm
def test_a_server_that_is_gone_is_told_so_and_tried_again(page, videos):
    page.route_web_socket("**/v1/live", lambda socket: socket.close(code=1006))
    page.route("**/v1/models", lambda route: route.abort())
    page.set_input_files("#file", videos[0][0])
    expect(page.locator("#problem")).to_contain_text("The server cannot be reached.")
    expect(page.locator("html")).to_have_attribute("data-phase", "waiting")
    page.unroute("**/v1/models")  # It is back, and wants a key.
    expect(page.locator("#problem")).to_have_text("This server asks for an API key.")


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["notes.txt", "broken.mp4"])
def test_a_file_that_is_no_video_is_told_so(page, tmp_path, name):
    (tmp_path / name).write_text("What a beautiful day!")
    page.set_input_files("#file", tmp_path / name)
    expect(page.locator("#problem")).to_contain_text(f"“{name}”")
    expect(page.locator("#problem")).to_contain_text("cannot be played")
    expect(page.locator("html")).to_have_attribute("data-phase", "empty")


@pytest.mark.vllm
def test_a_wrong_file_does_not_disturb_what_runs(page, videos):
    """Nor where it is dropped: a browser would show a file in place of the page. Text goes where it is dropped."""
    begin(page, videos[0][0])
    before = finished_captions(page)
    assert page.evaluate(DROP_BESIDE_THE_STAGE) == [True, False]
    expect(page.locator("#problem")).to_contain_text("“notes.txt” (text/plain) cannot be played")
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    assert transcript(page)[: len(before)] == before
    assert not page.evaluate("video.paused")
    # What breaks while it plays leaves its captions.
    page.evaluate("video.dispatchEvent(new Event('error'))")
    expect(page.locator("#problem")).to_contain_text("The browser could not show this.")
    expect(page.locator("html")).to_have_attribute("data-phase", "empty")
    assert transcript(page)[: len(before)] == before


@pytest.mark.vllm
def test_the_camera_is_captioned_and_let_go(page):
    page.click(".invitation [data-action=camera]")
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    wait_until(page, "Number(document.querySelector('[data-count=sent] dd').textContent) >= 3")
    page.evaluate("window.track = video.srcObject.getTracks()[0]")
    page.click("#stop")
    expect(page.locator("#status")).to_contain_text("Session ended: ")
    assert page.evaluate("track.readyState") == "ended"


# Messages of a screen, and what its timers do when they are due.
SHOW_PROBLEMS = """async (phase) => {
    const { Screen } = await import("/web/screen.js");
    const begin = window.setTimeout;
    let due = () => undefined;
    window.setTimeout = (action) => (due = action);
    const screen = new Screen(document, () => undefined);
    document.documentElement.dataset.phase = phase;
    const after = (lasting) => {
        screen.problem(lasting);
        screen.temporaryProblem("For a while.");
        due();
        return problem.hidden ? "" : problem.textContent;
    };
    const shown = ["", "It lasts."].map(after);
    window.setTimeout = begin;
    return shown;
}"""


@pytest.mark.vllm
def test_an_error_goes_by_itself_only_where_the_session_goes_on(page):
    assert page.evaluate(SHOW_PROBLEMS, "live") == ["", "It lasts."]
    assert page.evaluate(SHOW_PROBLEMS, "stopped") == ["For a while.", "It lasts."]
