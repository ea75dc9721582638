"""Takes the pictures of the page in docs/live.md: `pytest tests/browser/picture.py`. Not among the tests."""

import io
from pathlib import Path

import pytest
from PIL import Image

from accessibility import SCHEMES, SIZES
from clip import clip_truth
from live_page import ask, begin_clip, wait_until

DOCS = Path(__file__).parents[2] / "docs"
COLOURS = 256  # Enough for flat areas and text, at a quarter of the size.


@pytest.mark.vllm
def test_the_pictures_of_the_page(open_page):
    scene = max((span for span in clip_truth() if span.start > 20), key=lambda span: span.end - span.start)
    with open_page(color_scheme="light", reduced_motion="reduce") as page:
        begin_clip(page)
        wait_until(page, "video.currentTime > 12", timeout_s=100)
        ask(page, "How many digits are there?")
        page.locator("#question").blur()
        wait_until(page, f"video.currentTime > {scene.start + 1.2}", timeout_s=100)
        for size, viewport in SIZES.items():
            page.set_viewport_size(viewport)
            for scheme in SCHEMES:
                page.emulate_media(color_scheme=scheme)
                page.wait_for_timeout(200)
                name = f"live_{size}_{scheme}.png"
                save(page.screenshot(full_page=size == "phone"), DOCS / name)


def save(png, path):
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS).save(path, optimize=True)
