"""The page's own clip: what `casa-digits-video` makes of held-out digits, captioned right, its suggestions answered."""

import itertools

import numpy as np
import pytest
from playwright.sync_api import expect

from casa_digits.demonstration import DEMONSTRATION
from casa_digits.phrases import BEFORE, COUNT, NOTHING, READ
from casa_serving.caption.video import sample, scan
from clip import CLIPS, SCALE, SECONDS, clip_scenes, clip_truth
from live_page import begin_clip, count, transcript, wait_until

MAX_CLIP_BYTES = 100_000
# Of 255, on average: what the codec leaves out.
TOLERANCE = 3
# The answer to each suggestion, by the digits of the scene that is shown and of the one before.
RIGHT = {
    READ[0]: lambda shown, before: shown,
    COUNT[0]: lambda shown, before: str(len(shown.split())),
    BEFORE[0]: lambda shown, before: before,
}


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.suffix)
def test_the_clip_shows_held_out_digits(clip):
    assert clip.stat().st_size <= MAX_CLIP_BYTES
    seen = list(sample(scan(clip), fps=2))
    assert len(seen) == 2 * SECONDS
    scenes = dict(zip(clip_truth(), clip_scenes(), strict=True))
    for item in seen:
        (scene,) = (scene for span, scene in scenes.items() if span.start <= item.timestamp < span.end)
        drawn = scene.image.to_pil().resize(item.image.size, resample=3)
        assert drawn.size == (224 * SCALE, 112 * SCALE)
        assert np.abs(np.asarray(item.image, int) - np.asarray(drawn, int)).mean() <= TOLERANCE


def show_scenes(page):
    """Yield each scene once the page, whose video is paused, has shown the model a frame of it."""
    begin_clip(page)
    page.evaluate("video.pause()")
    for number, span in enumerate(clip_truth()):
        # Questions are about the last frame that was taken: none may be on its way.
        wait_until(page, f"{SENT} > 0 && {SENT} === {DONE} + {DROPPED}")
        done = count(page, "captioned") + count(page, "silent")
        page.evaluate(f"video.currentTime = {(span.start + span.end) / 2}")
        if number > 0:
            wait_until(page, f"{DONE} > {done}")
        yield span


@pytest.fixture(scope="module")
def questioned(open_page):
    """The page with its clip, stopped in each scene, where every suggestion was chosen: `(scene's text, answers)`."""
    with open_page() as page:
        expect(page.locator("#suggestions button")).to_have_text(DEMONSTRATION["questions"])
        found = []
        for span in show_scenes(page):
            asked = page.locator("#captions li.question").count()
            for button in page.locator("#suggestions button").all():
                button.click()
                expect(page.locator("#ask")).to_be_enabled()
            found.append((span.text, transcript(page, "question")[asked:]))
        yield page, found


SENT, DROPPED = (
    f"Number(document.querySelector('[data-count={name}] dd').textContent)" for name in ("sent", "dropped")
)
DONE = """["captioned", "silent"].map((name) => Number(document.querySelector(`[data-count=${name}] dd`).textContent))
    .reduce((sum, number) => sum + number)"""


@pytest.mark.vllm
def test_every_suggestion_is_answered_right(questioned):
    _, found = questioned
    wrong = [
        (text, question, answer)
        for (before, _), (text, answers) in itertools.pairwise([(NOTHING, []), *found])
        for question, (_, answer) in zip(DEMONSTRATION["questions"], answers, strict=True)
        if answer != RIGHT[question](text, before)
    ]
    assert len(wrong) <= 0.05 * len(found) * len(DEMONSTRATION["questions"]), wrong


@pytest.mark.vllm
def test_the_clip_is_captioned_right(open_page):
    """Where nobody asks in between; after three questions about each scene one caption in ten is left out."""
    with open_page() as page:
        texts = [span.text for span in show_scenes(page)]
        wait_until(page, f"{SENT} === {DONE} + {DROPPED}")
        captions = [text for _, text in transcript(page)]
    # The model misreads one text in twenty.
    assert sum(text in captions for text in texts) >= len(texts) - 1, captions


@pytest.mark.vllm
def test_the_page_names_the_model_and_what_it_reads(questioned):
    page, _ = questioned
    expect(page.locator("#model")).to_have_text(f"casa-tiny-digits {DEMONSTRATION['reads']}")
