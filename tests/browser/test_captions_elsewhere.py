"""Captions where the page does not draw them itself: text track, full screen, a small window, files."""

import pysubs2
import pytest
from playwright.sync_api import expect

from casa_serving.caption.subtitles import subtitles
from live_page import SENT, begin_camera, begin_clip, transcript, wait_until
from scripted_caption import frame_result

CUES = "[...video.textTracks[0].cues].map((cue) => [cue.startTime, cue.text])"
CLOSE_WHILE_BUSY = """() => {
    for (const end = performance.now() + 150; performance.now() < end; );
    documentPictureInPicture.window.close();
}"""
BELOW = "caption.getBoundingClientRect().top - video.getBoundingClientRect().bottom"


@pytest.fixture(scope="module")
def page(open_page):
    """A phone that has played the first scenes of the clip."""
    with open_page(viewport={"width": 390, "height": 844}) as opened:
        begin_clip(opened)
        wait_until(opened, "captions.querySelectorAll('li').length >= 2 && video.currentTime > 6")
        opened.evaluate("video.pause()")
        opened.wait_for_timeout(500)
        yield opened


@pytest.mark.vllm
def test_each_caption_is_a_cue_of_the_text_track(page):
    cues = page.evaluate(CUES)
    assert [text for _, text in cues] == [text for _, text in transcript(page)]
    assert page.evaluate("[video.textTracks[0].kind, video.textTracks[0].mode]") == ["captions", "hidden"]
    assert page.evaluate("video.textTracks[0].activeCues[0].text") == page.locator("#caption").text_content()


@pytest.mark.vllm
def test_the_caption_never_covers_the_picture(page):
    assert page.evaluate(BELOW) >= 0


@pytest.mark.vllm
def test_what_stands_below_stays_there_however_long_a_caption_is(page):
    shown = page.locator("#caption").text_content()
    tops = []
    for text in ("", "9 7 5", "a long caption of many words " * 8):
        page.evaluate("(text) => (caption.textContent = text)", text)
        tops.append(page.evaluate("document.querySelector('.controls').getBoundingClientRect().top"))
    assert len(set(tops)) == 1, tops
    page.evaluate("(text) => (caption.textContent = text)", shown)


@pytest.mark.vllm
def test_the_videos_own_full_screen_draws_the_track(page):
    """Entered by the button of the browser's controls; here by the same call."""
    page.locator("#source-name").click()  # A browser wants a gesture before it.
    page.evaluate("video.requestFullscreen()")
    wait_until(page, "video.textTracks[0].mode === 'showing'")
    page.evaluate("document.exitFullscreen()")
    wait_until(page, "video.textTracks[0].mode === 'hidden'")


@pytest.mark.vllm
def test_full_screen_has_the_caption_under_the_picture(page):
    page.click("#full-screen")
    wait_until(page, "document.fullscreenElement === stage")
    assert page.evaluate(BELOW) >= 0
    assert page.evaluate("caption.getBoundingClientRect().bottom <= innerHeight")
    page.evaluate("document.exitFullscreen()")
    wait_until(page, "document.fullscreenElement === null")


@pytest.mark.vllm
@pytest.mark.parametrize("suffix", ["srt", "vtt"])
def test_the_files_are_those_of_casa_caption(page, tmp_path, suffix):
    with page.expect_download() as download:
        page.click(f"#save-{suffix}")
    assert download.value.suggested_filename == f"Sample clip.{suffix}"
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    saved = pysubs2.load(str(path))
    records = [frame_result(start, text) for start, text in page.evaluate(CUES)]
    expected = subtitles(records, page.evaluate("video.duration"))
    assert [(line.start, line.end, line.plaintext) for line in saved] == [
        (line.start, line.end, line.plaintext) for line in expected
    ]


@pytest.mark.vllm
def test_what_a_caption_holds_is_no_markup(page):
    written = page.evaluate("""async () => {
        const { toSrt, toVtt } = await import("/web/subtitles.js");
        const captions = [{ timestamp: 3599.9996, text: " <b>1</b> {2}\\n\\\\ & -->" }, { timestamp: 3700, text: "3" }];
        return [toSrt(captions, 3702), toVtt(captions, NaN)];
    }""")
    assert written[0] == (
        "1\n01:00:00,000 --> 01:00:10,000\n\u2039b\u203a1\u2039/b\u203a (2) / & --\u203a\n"
        "\n2\n01:01:40,000 --> 01:01:42,000\n3\n"
    )
    # A camera that is off has no duration: its last caption stands as long as any.
    assert written[1] == (
        "WEBVTT\n\n01:00:00.000 --> 01:00:10.000\n\u2039b\u203a1\u2039/b\u203a (2) / &amp; --\u203a\n"
        "\n01:01:40.000 --> 01:01:50.000\n3\n"
    )


@pytest.mark.vllm
def test_the_small_window_takes_the_caption_along(page):
    page.evaluate("video.pause()")
    shown = page.locator("#caption").text_content()
    with page.context.expect_page() as opened:
        page.click("#small-window")
    small = opened.value
    expect(small.locator("#caption")).to_have_text(shown)
    expect(page.locator("#caption")).to_have_count(0)
    page.click("#small-window")  # Once more closes it.
    expect(page.locator("#stage #caption")).to_be_visible()
    assert small.is_closed() and len(page.context.pages) == 1


@pytest.mark.vllm
def test_a_video_plays_on_into_the_small_window_and_back(page):
    page.evaluate("video.play()")
    with page.context.expect_page() as opened:
        page.click("#small-window")
    # The elements of the page are found by this name in its own document only.
    page.evaluate("window.moved = documentPictureInPicture.window.document.querySelector('video')")
    for is_small in (True, False):
        sent = page.evaluate(SENT)
        wait_until(page, f"{SENT} > {sent}")
        assert not page.evaluate("moved.paused")
        if is_small:
            opened.value.close()
            expect(page.locator("#stage #caption")).to_be_visible()


@pytest.mark.vllm
def test_frames_are_sent_on_when_a_busy_page_takes_its_video_back(open_page):
    """Chromium 156 mostly loses the callback for frames then."""
    with open_page() as page:
        begin_camera(page)
        for _ in range(3):
            page.click("#small-window")
            expect(page.locator("#stage")).to_have_count(0)
            page.evaluate(CLOSE_WHILE_BUSY)
            expect(page.locator("#stage #caption")).to_be_visible()
            sent = page.evaluate(SENT)
            wait_until(page, f"{SENT} > {sent + 1}")
