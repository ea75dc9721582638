"""Takes the picture of the page in docs/live.md: `pytest tests/browser/picture.py`. Not among the tests."""

from pathlib import Path

import pytest

from casa_digits.video import make_video
from live_page import ask, begin, wait_until

PICTURE = Path(__file__).parents[2] / "docs" / "live.png"
TEXT_BUDGET = 160  # Small, so that the picture shows how the oldest captions leave.


@pytest.mark.vllm
def test_the_picture_of_the_page(open_page, tmp_path):
    truth = make_video(tmp_path / "digits.mp4", seconds=48, fps=10, seed=17, scale=2)
    scene = max((span for span in truth if span.start > 30), key=lambda span: span.end - span.start)
    with open_page(color_scheme="light") as page:
        page.evaluate(f"document.querySelector('[name=text_budget]').value = {TEXT_BUDGET}")
        begin(page, tmp_path / "digits.mp4")
        wait_until(page, f"video.currentTime > {scene.start - 8}", timeout_s=100)
        ask(page, "How many digits are there?")
        page.locator("#question").blur()
        wait_until(page, f"video.currentTime > {scene.start + 1.2}", timeout_s=100)
        page.screenshot(path=PICTURE)
